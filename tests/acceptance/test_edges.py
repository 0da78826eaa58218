"""What a demanding user runs into: odd inputs, odd commands, and inputs that change between a job and its retry."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import Rowmill

GENERATE = ("-m", "fake", "-t", "generate", "-p", "Say: {text}")
RESULTS = ["output", "finish_reason", "prompt_tokens", "cached_tokens", "completion_tokens", "error"]


def texts(rowmill: Rowmill, name: str, rows: int = 10) -> Path:
    path = rowmill.home / name
    pq.write_table(pa.table({"id": range(rows), "text": [f"r{n}" for n in range(rows)]}), path)
    return path


def read(rowmill: Rowmill, out: str = "out") -> pa.Table:
    return pq.read_table(rowmill.home / out / "data")


def last_job(rowmill: Rowmill) -> str:
    return str(rowmill.inside("job", "list", "--json").document["jobs"][0]["id"])


def test_columns_of_every_kind_come_out_as_they_went_in(rowmill: Rowmill) -> None:
    n = 50
    three = pa.array([i % 3 for i in range(n)], pa.int8())
    moments = [dt.datetime(2026, 1, 1) + dt.timedelta(hours=i) for i in range(n)]
    given = pa.table(
        {
            "text": pa.array([f"row {i}" for i in range(n)], pa.large_string()),
            "view": pa.array([f"view {i}" for i in range(n)], pa.string_view()),
            "bytes": pa.array([bytes([i, 255]) for i in range(n)], pa.binary()),
            "two bytes": pa.array([bytes([i, 255]) for i in range(n)], pa.binary(2)),
            "words": pa.DictionaryArray.from_arrays(three, pa.array(["a", "b", "c"], pa.large_string())),
            "numbers": pa.DictionaryArray.from_arrays(three, pa.array([10, 20, 30])),
            "decimal": pa.array([decimal.Decimal(i) / 4 for i in range(n)], pa.decimal256(50, 4)),
            "zoned": pa.array(moments, pa.timestamp("us", "Europe/Amsterdam")),
            "nanoseconds": pa.array([i * 1000003 for i in range(n)], pa.timestamp("ns")),
            "seconds": pa.array(range(n), pa.timestamp("s")),
            "day": pa.array([i * 86400000 for i in range(n)], pa.date64()),
            "time": pa.array(range(n), pa.time64("ns")),
            "duration": pa.array(range(n), pa.duration("s")),
            "half": pa.array(np.arange(n, dtype=np.float16)),
            "unsigned": pa.array([2**63 + i for i in range(n)], pa.uint64()),
            "nothing": pa.nulls(n),
            "structs": pa.array([[{"a": i, "b": [str(i), None]}] * (i % 3) if i % 5 else None for i in range(n)]),
            "pair": pa.array([[i, i] for i in range(n)], pa.list_(pa.float32(), 2)),
            "map": pa.array([[("k", i)] for i in range(n)], pa.map_(pa.string(), pa.int64())),
            "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(n * 6, dtype=np.float32).reshape(n, 2, 3)),
            "uuid": pa.array([os.urandom(16) for _ in range(n)], pa.uuid()),
        }
    )
    pq.write_table(given, rowmill.home / "in.parquet", row_group_size=17)
    done = rowmill.inside("run", "in.parquet", "-o", "out", *GENERATE, "--shard-rows", "20")
    assert done.code == 0, done.err
    before, after = pq.read_table(rowmill.home / "in.parquet"), read(rowmill)
    assert after.schema.names == [*before.schema.names, *RESULTS]
    for field in before.schema:
        kept = after.schema.field(field.name).type
        if pa.types.is_dictionary(field.type):
            # Indices wide enough for the values of any number of files.
            assert (kept.index_type, kept.value_type) == (pa.int32(), field.type.value_type), field.name
            assert after[field.name].to_pylist() == before[field.name].to_pylist(), field.name
            continue
        assert kept == field.type, field.name
        assert after[field.name].equals(before[field.name]), field.name
    assert after.schema.field("error").type == pa.struct([("code", pa.string()), ("message", pa.string())])


def test_csv_values_that_would_not_survive_as_numbers_stay_text(rowmill: Rowmill) -> None:
    (rowmill.home / "in.csv").write_text(
        "text,postcode,account,ratio,count\na,0712,12345678901234567890,0.5,1\nb,1234,5.5,-0.25,0\n"
    )
    done = rowmill.inside("run", "in.csv", "-o", "out", *GENERATE)
    assert done.code == 0, done.err
    table = read(rowmill)
    assert table["postcode"].to_pylist() == ["0712", "1234"]
    assert table["account"].to_pylist() == ["12345678901234567890", "5.5"]
    assert table["ratio"].to_pylist() == [0.5, -0.25]
    assert table["count"].to_pylist() == [1, 0]


def test_a_retry_that_fails_keeps_what_was_published_before(rowmill: Rowmill) -> None:
    source = texts(rowmill, "in.parquet")
    words = ("run", "in.parquet", "-o", "out", *GENERATE, "--set", "fail_rows_matching=r3")
    assert rowmill.inside(*words).code == 4
    before = read(rowmill)
    texts(rowmill, "in.parquet", rows=12)
    done = rowmill.inside("job", "retry", last_job(rowmill))
    assert done.code == 3
    assert "changed after the job was planned" in done.err + done.out
    assert read(rowmill).equals(before)
    source.unlink()
    assert rowmill.inside("job", "retry", last_job(rowmill)).code == 3
    assert read(rowmill).equals(before)


def test_a_retry_after_the_output_was_removed_ends_and_frees_the_output(rowmill: Rowmill) -> None:
    texts(rowmill, "in.parquet")
    words = ("run", "in.parquet", "-o", "out", *GENERATE, "--set", "fail_rows_matching=r3")
    assert rowmill.inside(*words).code == 4
    shutil.rmtree(rowmill.home / "out")
    assert rowmill("job", "retry", last_job(rowmill)).code == 3
    assert rowmill.inside("job", "show", last_job(rowmill), "--json").document["job"]["state"] == "failed"
    assert rowmill.inside(*words).code == 4
    assert read(rowmill).num_rows == 10


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(rowmill: Rowmill) -> None:
    texts(rowmill, "in.parquet")
    # /proc refuses new folders even to root; file permissions do not.
    done = rowmill.inside("run", "in.parquet", "-o", "/proc/rowmill", *GENERATE, "--json")
    assert done.code == 2
    assert done.document["error"]["field"] == "output"
    assert rowmill.inside("job", "list", "--json").document["jobs"] == []


def test_the_same_command_after_a_partial_output_names_the_way_on(rowmill: Rowmill) -> None:
    texts(rowmill, "in.parquet")
    stop = ("--set", "fail_rows_matching=r3", "--max-failed-rows", "0")
    assert rowmill.inside("run", "in.parquet", "-o", "out", *GENERATE, *stop).code == 3
    done = rowmill.inside("run", "in.parquet", "-o", "out", *GENERATE, *stop)
    assert done.code == 2
    assert f"rowmill job retry {last_job(rowmill)}" in done.err


@pytest.mark.parametrize("command", ["show", "errors", "cancel", "retry", "resume", "wait", "watch"])
def test_an_empty_id_is_no_job(rowmill: Rowmill, command: str) -> None:
    """``rowmill job cancel "$JOB"`` with an unset variable."""
    texts(rowmill, "in.parquet")
    assert rowmill.inside("run", "in.parquet", "-o", "out", *GENERATE).code == 0
    done = rowmill.inside("job", command, "")
    assert done.code == 6
    assert "empty" in done.err


def test_an_empty_path_is_not_the_working_directory(rowmill: Rowmill) -> None:
    texts(rowmill, "in.parquet")
    done = rowmill.inside("run", "", "-o", "../out", *GENERATE)
    assert done.code == 2
    assert "the path is empty" in done.err
    for nowhere in ("s3://", "file:///"):
        done = rowmill.inside("run", "in.parquet", "-o", nowhere, *GENERATE)
        assert done.code == 2
        assert "names no bucket or folder" in done.err
    assert [path.name for path in rowmill.home.iterdir()] == ["in.parquet"]


def test_the_output_of_a_job_as_input_says_what_helps(rowmill: Rowmill) -> None:
    texts(rowmill, "in.parquet")
    assert rowmill.inside("run", "in.parquet", "-o", "one", *GENERATE).code == 0
    embed = ("run", "one", "-o", "two", "-m", "fake", "-t", "embed", "--column", "output")
    done = rowmill.inside(*embed)
    assert done.code == 2
    assert "--keep" in done.err
    assert "--output-prefix" not in done.err  # it would not help with 'error'
    assert rowmill.inside(*embed, "--keep", "id", "--keep", "output").code == 0
    assert read(rowmill, "two").schema.names == ["id", "output", "embedding", "prompt_tokens", "error"]


@pytest.mark.parametrize("option", ["--data-dir", "--setting"])
def test_a_folder_that_cannot_be_made_is_a_bad_setting(rowmill: Rowmill, option: str) -> None:
    texts(rowmill, "in.parquet")
    (rowmill.home / "file").touch()
    value = "file" if option == "--data-dir" else "cache_dir=file/below"
    done = rowmill.inside("run", "in.parquet", "-o", "out", *GENERATE, option, value)
    assert done.code == 2, done.err
    assert "the folder file" in done.err


def test_a_database_of_a_newer_version_is_named_as_such(rowmill: Rowmill) -> None:
    assert rowmill.inside("job", "list").code == 0
    (database,) = Path(rowmill.environment["ROWMILL_DATA_DIR"]).glob("*.db")
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    done = rowmill.inside("job", "list")
    assert done.code == 1
    assert "upgrade Rowmill" in done.err


def test_to_cancel_an_ended_job_tells_its_state(rowmill: Rowmill) -> None:
    texts(rowmill, "in.parquet")
    assert rowmill.inside("run", "in.parquet", "-o", "out", *GENERATE).code == 0
    done = rowmill.inside("job", "cancel", last_job(rowmill))
    assert done.code == 0
    assert "completed" in done.out
    assert "nothing to cancel" in done.err


def test_odd_names_of_files_are_files(rowmill: Rowmill) -> None:
    names = ["br[1].parquet", "q?.parquet", "pct%20.parquet", "hash#1.parquet", "sp ace.parquet", "ünï.parquet"]
    for n, name in enumerate(names):
        texts(rowmill, name, rows=n + 1)
        out = f"out {name}"
        done = rowmill.inside("run", name, "-o", out, *GENERATE)
        assert done.code == 0, done.err
        assert read(rowmill, out).num_rows == n + 1


@pytest.mark.vllm
def test_vllm_leaves_no_sockets_behind(rowmill: Rowmill) -> None:
    from examples.tiny_llama import build_llama

    build_llama(rowmill.home / "llama")
    texts(rowmill, "in.parquet")
    with tempfile.TemporaryDirectory() as temporary:  # a short name: sockets have at most 107 bytes for theirs
        words = ("-m", "llama", "-t", "generate", "-p", "Say: {text}", "--sampling", "max_tokens=4")
        done = rowmill("run", "in.parquet", "-o", "out", *words, TMPDIR=temporary, VLLM_CPU_KVCACHE_SPACE="1")
        assert done.code == 0, done.err
        assert [path.name for path in Path(temporary).iterdir() if path.is_socket()] == []


def test_json_also_when_the_command_fails(rowmill: Rowmill) -> None:
    commands: list[tuple[Any, ...]] = [
        ("run", "nosuch.parquet", "-o", "out", *GENERATE),
        *(("job", verb, "zzz") for verb in ("show", "errors", "cancel", "retry", "resume", "wait", "watch")),
    ]
    for words in commands:
        done = rowmill.inside(*words, "--json")
        document = json.loads(done.out)
        assert document["version"] == 1
        assert document["error"]["exit_code"] == done.code != 0
