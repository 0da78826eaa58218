"""Fault 23: the input is overwritten while the job reads it. A clear failure, and never rows of two versions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import s3fs

from pipeline import Client
from pipeline.config.settings import Settings
from storage import failpoints
from storage.states import JobState
from tests.conftest import S3
from tests.faults.driver import World
from tests.faults.sabotage import work


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.disarm()


def write(path: Path, word: str) -> None:
    """200 rows in small row groups, laid out so that another word of the same length changes no offset in the file."""
    table = pa.table({"id": range(200), "text": [f"{word} number {n:05d}" for n in range(200)]})
    pq.write_table(table, path, row_group_size=20, compression="none", use_dictionary=False)


def in_place(source: Path, target: Path) -> None:
    """The same file, written over: a reader that has it open sees new rows behind the old footer."""
    assert source.stat().st_size == target.stat().st_size
    with target.open("r+b") as file:
        file.write(source.read_bytes())


def replaced(source: Path, target: Path) -> None:
    """Another file under its name: a reader that has the old one open goes on reading the old one."""
    source.replace(target)


def cut_short(source: Path, target: Path) -> None:
    os.truncate(target, target.stat().st_size // 2)


def removed(source: Path, target: Path) -> None:
    target.unlink()


@pytest.mark.parametrize("keep", [None, []], ids=["kept", "results-only"])
@pytest.mark.parametrize("change", [in_place, replaced, cut_short, removed])
def test_23_the_input_changes_under_the_engine(
    world: World, tmp_path: Path, change: Callable[[Path, Path], None], keep: list[str] | None
) -> None:
    """Fault 23: the file changes after the first flush, while the engine waits for more of its rows.

    With kept columns the file is read a second time at the end; without, nothing but the reading itself can notice.
    """
    write(world.input, "old")
    write(tmp_path / "new.parquet", "NEW")
    gate = tmp_path / "gate"
    # Else all of these few rows are read, rightly, before the file changes.
    world.replace_settings(read_ahead_bytes=0)
    options = {"gate_file": str(gate), "gate_after_rows": 10}
    job = world.submit(shard_rows=200, engine_options=options, keep_columns=keep)

    def strike() -> None:
        if not gate.exists():
            change(tmp_path / "new.parquet", world.input)
            gate.touch()

    failpoints.arm("flush.recorded", strike)
    work(world, job)
    ended = world.job(job)
    assert (ended.state, ended.stop_reason) == (JobState.FAILED, "failed")
    assert f"input file {world.input} " in (ended.error or "")
    assert ("is gone" if change is removed else "was changed") in (ended.error or "")
    assert not (world.output / "_SUCCESS").exists()
    for file in (world.output / "data").glob("*"):
        answers: list[Any] = pq.read_table(file).column("output").to_pylist()
        assert not any("NEW" in answer for answer in answers)


def test_23_an_object_changes_between_two_shards(settings: Settings, s3: S3, tmp_path: Path) -> None:
    """Fault 23 at an object store: the next shard finds another etag."""
    bucket = s3fs.S3FileSystem(**s3.storage_options["s3"], use_listings_cache=False, skip_instance_cache=True)
    for word in ("old", "NEW"):
        write(tmp_path / f"{word}.parquet", word)
    bucket.put_file(str(tmp_path / "old.parquet"), f"{s3.bucket}/in.parquet")

    def strike() -> None:
        bucket.put_file(str(tmp_path / "NEW.parquet"), f"{s3.bucket}/in.parquet")

    failpoints.arm("commit.done", strike)
    fields: dict[str, Any] = {"model": "fake", "task": "generate", "prompt": "{text}", "keep_columns": []}
    with Client(settings=settings.model_copy(update={"storage_options": s3.storage_options})) as client:
        done = client.run(**fields, input=s3.url("in.parquet"), output=s3.url("out"), shard_rows=100)
    assert done.state is JobState.FAILED
    assert "in.parquet was changed after the job was planned" in (done.error or "")
    assert not bucket.exists(f"{s3.bucket}/out/_SUCCESS")
    answers: list[Any] = ds.dataset(f"{s3.bucket}/out/data", filesystem=bucket).to_table().column("output").to_pylist()
    assert len(answers) == 100
    assert not any("NEW" in answer for answer in answers)
