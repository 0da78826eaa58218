"""Whatever a request holds: it is refused by the name of its field, or its job runs to its end."""

from __future__ import annotations

import math
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.spec.job_spec import JobSpec, parse, stored
from storage.errors import InvalidInput, InvalidJob
from storage.states import JobState
from tests.engines.onnx.support import graph, value
from tests.examples import examples

DEEP: Any = "x"
for _ in range(2000):
    DEEP = [DEEP]
HOSTILE: list[Any] = [
    *("", " ", "\0", "a\0b", "\ud800", "x" * 5000, "memory://x", "file://", "s3://", "{", "{text}", "error", "id"),
    *("output", "9" * 309 + "d", "0s", "text"),
    *(-1, 0, 1, 2**31, 2**63, 2**64, 10**400, -(2**63), math.nan, math.inf, -math.inf, 0.5, True, False, None),
    *(
        [],
        [""],
        ["text", "text"],
        ["id"],
        [None],
        [DEEP],
        {},
        {"": ""},
        {"a": math.nan},
        {"a": 2**63},
        {"text": "text"},
    ),
    *({"a\0": "b"}, {"a": "\ud800"}, {"a": DEEP}, {1: 2}, {"seed": 2**63}, {"n": 10**30}, b"bytes", object(), {1, 2}),
]
FIELDS = sorted(JobSpec.model_fields)


@pytest.fixture
def client(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    pq.write_table(pa.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "in.parquet")
    monkeypatch.chdir(tmp_path)
    with Client(settings=settings) as client:
        yield client


def fields(**more: Any) -> dict[str, Any]:
    base = {"input": "in.parquet", "output": f"out-{uuid.uuid4().hex}", "model": "fake", "task": "generate"}
    return base | {"prompt": "{text}"} | more


@given(st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(HOSTILE), min_size=1, max_size=2))
@example({"idempotency_key": "x" * 201})
@example({"output": "x" * 5000})
@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_request_is_refused_by_its_field_or_runs(client: Client, hostile: dict[str, Any]) -> None:
    before = len(client.jobs(limit=1000))
    try:
        done = client.run(**fields(**hostile))
    except InvalidJob as error:
        assert any(name in str(error) for name in hostile), error
        str(error).encode()
        assert len(client.jobs(limit=1000)) == before, "a refused request was stored"
    else:
        assert done.state is JobState.COMPLETED
        assert done.to_json() == next(job for job in client.jobs(limit=1) if job.id == done.id).to_json()


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"keep_columns": ["id", "id"]}, "keep_columns"),
        ({"prompt": " "}, "prompt"),
        ({"completion_window": "9" * 309 + "d"}, "completion_window"),
        ({"completion_window": "0s"}, "completion_window"),
        ({"max_failed_rows": 2**63}, "max_failed_rows"),
        ({"shard_rows": True}, "shard_rows"),
        ({"request_timeout": True}, "request_timeout"),
        ({"video_frame_rate": False, "video_column": "v"}, "video_frame_rate"),
        ({"output": "memory://gone"}, "output"),
        ({"input": ["memory://gone"]}, "input.0"),
        ({"output": "https://host/out"}, "output"),
        ({"output": "dir://out"}, "output"),
        ({"input": ["zip://in.zip"]}, "input.0"),
        ({"input": ["in.parquet", "generic://in.parquet"]}, "input.1"),
        ({"output": "github://me:it@/out"}, "output"),
        ({"input": ["a\0.parquet"]}, "input.0"),
        ({"model": "a\0b"}, "model"),
        ({"idempotency_key": "\ud800"}, "idempotency_key"),
        ({"metadata": {"a": "\0"}}, "metadata.a"),
        ({"task": "chat", "prompt": None, "messages": []}, "messages"),
        ({"task": "chat", "prompt": None, "messages": [{"role": "user", "content": ""}]}, "messages.0.content"),
        ({"engine_options": {"gate_file": "a\0b"}}, "engine_options"),
        ({"sampling": {"seed": 2**63}}, "sampling"),
    ],
)
def test_what_no_job_can_hold_names_its_field(more: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        parse(fields(**more))
    assert caught.value.field == field


def test_a_stored_request_of_an_earlier_version_is_read(client: Client) -> None:
    made = parse(fields()).model_dump(mode="json")
    assert stored(made | {"completion_window": "9" * 309 + "d", "prompt": ""}).window_seconds == math.inf


def test_a_job_that_expires_beyond_all_dates_breaks_no_list(client: Client) -> None:
    from storage.sql import tables

    done = client.run(**fields())
    with client._runtime.database.write() as connection:
        connection.execute(tables.job.update().values(expires_at=math.inf))
    [job] = client.jobs()
    assert (job.id, job.expires_at) == (done.id, None)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)  # a short name: the working directory is the test's


@pytest.mark.parametrize("asked", ["folder/x.parquet", "folder", "folder/*.parquet"])
@pytest.mark.parametrize(("make", "kind"), [(pipe, "a named pipe"), (unix_socket, "a socket")])
def test_what_is_no_file_is_never_waited_for(
    client: Client, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], kind: str, asked: str
) -> None:
    folder = Path("folder").absolute()
    folder.mkdir()
    with monkeypatch.context() as within:
        within.chdir(folder)
        make(folder / "x.parquet")
    with pytest.raises(InvalidInput, match=f"x.parquet is {kind}, not a file"):
        client.run(**fields(input=asked))


def test_a_device_is_no_input(client: Client) -> None:
    with pytest.raises(InvalidInput, match="/dev/zero is a device"):
        client.run(**fields(input="/dev/zero"))


def negation(folder: Path, output: str) -> dict[str, Any]:
    """A job over a graph with an output of that name."""
    x, out = (value(name, TensorProto.FLOAT, ["n"]) for name in ("x", output))
    graph(folder / "g.onnx", [helper.make_node("Neg", ["x"], [output])], [x], [out])
    pq.write_table(pa.table({"id": [1, 2], "x": pa.array([0.5, 1.5], pa.float32())}), folder / "x.parquet")
    return {"input": "x.parquet", "output": "out", "model": str(folder / "g.onnx"), "task": "tensor"}


@pytest.mark.parametrize(
    ("name", "prefix", "refused"),
    [("id", "", "output_prefix"), ("error", "", "output_prefix"), ("error", "x_", None), ("y", "", None)],
)
def test_outputs_of_a_graph_do_not_take_the_names_of_others(
    client: Client, tmp_path: Path, name: str, prefix: str, refused: str | None
) -> None:
    job = negation(tmp_path, name) | {"output": "graph", "output_prefix": prefix}
    if refused is None:
        assert client.run(**job).state is JobState.COMPLETED
        assert pq.read_table(tmp_path / "graph/data").schema.names == ["id", "x", prefix + name, "error"]
        return
    with pytest.raises(InvalidJob, match=name) as caught:
        client.run(**job)
    assert caught.value.field == refused
    assert client.jobs() == []


def test_an_engine_that_only_shows_its_columns_when_loaded_is_stopped_before_any_row(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.engines.fake.engine import FakeEngine

    pq.write_table(pa.table({"output": [1.0, 2.0]}), "numbers.parquet")
    monkeypatch.setattr(FakeEngine, "result_names", classmethod(lambda cls, spec, model: None))
    job = {"input": "numbers.parquet", "output": "late", "model": "fake", "task": "tensor"}
    done = client.run(**job)
    assert (done.state, done.rows_done) == (JobState.FAILED, 0)
    assert "output_prefix" in str(done.error)


def test_columns_that_differ_by_case_only_are_mentioned(client: Client) -> None:
    pq.write_table(pa.table({"Output": ["a"], "text": ["b"]}), "cased.parquet")
    said: list[str] = []
    client.run(**fields(input="cased.parquet"), on_notice=said.append)
    assert any("'Output'" in line and "DuckDB" in line for line in said), said


@pytest.mark.parametrize("name", ["NoSuchExecutionProvider", "CoreMLExecutionProvider"])
def test_a_provider_that_this_machine_lacks_is_refused(client: Client, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidJob, match=name) as caught:
        client.run(**negation(tmp_path, "y"), engine_options={"providers": [name]})
    assert caught.value.field == "engine_options.providers"
    assert client.jobs() == []
