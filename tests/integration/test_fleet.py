"""A fleet as docker-compose.yml starts it: its commands as plain processes, on PostgreSQL, Redis and S3.

Ten jobs of three tenants run on ONNX Runtime and vLLM while a worker is killed, another is drained, the broker forgets
everything and is away for a while; then every output row is looked at.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
import yaml

from pipeline import Client
from pipeline.config.settings import Settings
from storage.fleet import workers
from storage.fleet.workers import WorkerStatus
from storage.states import AttemptState, JobState, ShardState
from tests.conftest import S3
from tests.faults.driver import REPOSITORY, Process, environment, wait_until
from tests.servers import Server

pytestmark = [pytest.mark.postgres, pytest.mark.vllm, pytest.mark.timeout(900)]

COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
WIDTH = 1024
ROUNDS = 80
"""Matrix products for each row: a shard takes seconds, so that there is time to kill its worker."""
TENANTS = ("atlas", "borealis", "cumulus")
DEADLINE = 240.0

SUBMIT = """
import json, sys
from pipeline import Client
with Client() as client:
    print(json.dumps([client.submit(**fields).id for fields in json.load(sys.stdin)]))
"""


class Fleet:
    """The processes and what is known of them. ``settings`` are what every process gets by its environment."""

    def __init__(self, settings: Settings, home: Path, stack: ExitStack) -> None:
        self.settings, self.home, self._stack = settings, home, stack
        self.started: list[Process] = []
        self.client = stack.enter_context(Client(settings=settings))
        self.database = self.client._runtime.database

    def start(self, service: str) -> Process:
        """A service of docker-compose.yml: its command, found beside our own interpreter."""
        program, *arguments = COMPOSE["services"][service]["command"]
        command = [str(Path(sys.executable).with_name(program)), *arguments]
        process = Process(command, environment(self.settings), self.home / f"{service}-{len(self.started)}.log")
        self.started.append(process)
        self._stack.enter_context(process)
        return process

    def row(self, process: Process) -> WorkerStatus | None:
        """What the database knows of the worker in this process."""
        assert process.running(), f"it has ended:\n{process.err}"
        return next((seen for seen in workers.listed(self.database) if seen.worker.pid == process.pid), None)

    def registered(self, process: Process) -> WorkerStatus:
        return wait_until(lambda: self.row(process), "the worker's registration", deadline=DEADLINE)  # type: ignore[return-value]

    def rowmill(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("rowmill")), *arguments]
        return subprocess.run(
            command, env=environment(self.settings), cwd=self.home, capture_output=True, text=True, check=False
        )

    def submit(self, jobs: Sequence[dict[str, Any]]) -> list[str]:
        """From another process, as from another host."""
        done = subprocess.run(
            [sys.executable, "-c", SUBMIT],
            input=json.dumps(jobs),
            env=environment(self.settings) | {"PYTHONPATH": str(REPOSITORY)},
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        ids: list[str] = json.loads(done.stdout)
        return ids

    def completed(self, job_id: str) -> None:
        def over() -> Any:
            status = self.client.job(job_id).status()
            return status if status.terminal else None

        try:
            status = wait_until(over, f"the end of job {job_id}", deadline=DEADLINE)
        except AssertionError as error:
            logs = "\n".join(f"--- {p.log.name}\n{p.err[-3000:]}" for p in self.started)
            raise AssertionError(f"{error}; {self.client.job(job_id).status()}\n{logs}") from None
        assert status.state is JobState.COMPLETED, status

    def table(self, job_id: str) -> pa.Table:
        return self.client.job(job_id).table()


@pytest.fixture
def fleet(postgres_database: str, redis_url: str, s3: S3, tmp_path: Path, cache_dir: Path) -> Iterator[Fleet]:
    settings = Settings(
        data_dir=tmp_path / "data",
        cache_dir=cache_dir,
        database_url=postgres_database,
        broker_url=redis_url,
        storage_options=s3.storage_options,
        lease_seconds=5.0,
        tick_seconds=1.0,
        flush_rows=100,
        read_batch_rows=25,
        drain_grace_seconds=1.0,
    )
    with ExitStack() as stack:
        yield Fleet(settings, tmp_path, stack)


def _graph(path: Path) -> np.ndarray[Any, Any]:
    """A graph that works hard on each row: tanh(x·W), again and again; returns W."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(5).normal(0, 1.2 / WIDTH**0.5, (WIDTH, WIDTH)).astype(np.float32)
    nodes, last = [], "x"
    for n in range(ROUNDS):
        out = "y" if n == ROUNDS - 1 else f"t{n}"
        nodes += [helper.make_node("MatMul", [last, "w"], [f"m{n}"]), helper.make_node("Tanh", [f"m{n}"], [out])]
        last = out
    graph = helper.make_graph(
        nodes,
        "hard",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", WIDTH])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return weights


def test_a_fleet_loses_nothing(fleet: Fleet, s3: S3, redis_server: Server, tmp_path: Path) -> None:
    from examples.tiny_llama import build_llama

    weights, llama = _graph(tmp_path / "hard.onnx"), build_llama(tmp_path / "llama")
    n_hard, n_text = 800, 24
    rows = np.random.default_rng(7).normal(size=(n_hard, WIDTH)).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), WIDTH)
    texts = [f"parcel number {n}" for n in range(n_text)]
    store = fleet.client._runtime.store
    for name, table in (
        ("hard", pa.table({"id": range(n_hard), "x": vectors})),
        ("texts", pa.table({"id": range(n_text), "text": texts})),
    ):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        store.put_bytes(s3.url(f"in/{name}.parquet"), sink.getvalue().to_pybytes())

    beat, control = fleet.start("beat"), fleet.start("control")
    first, vllm = fleet.start("onnx-worker"), fleet.start("vllm-worker")
    jobs: list[dict[str, Any]] = [
        {
            "input": s3.url("in/hard.parquet"),
            "output": s3.url(f"out/{n}"),
            "model": str(tmp_path / "hard.onnx"),
            "task": "tensor",
            "keep_columns": ["id"],
            # Small batches: a shard flushes several times before it is committed.
            "engine_options": {"intra_op_num_threads": 1, "max_batch": 20},
            "shard_rows": 200,
            "tenant": TENANTS[n % 3],
        }
        if n < 6
        else {
            "input": s3.url("in/texts.parquet"),
            "output": s3.url(f"out/{n}"),
            "model": str(llama),
            "task": "generate" if n < 8 else "chat",
            "prompt": "Say: {text}",
            "sampling": {"max_tokens": 8, "temperature": 0},
            "shard_rows": 10,
            "tenant": TENANTS[n % 3],
        }
        for n in range(10)
    ]
    ids = fleet.submit(jobs)
    listed = {job.id: job.tenant for job in fleet.client.jobs(limit=20)}
    assert listed == {job_id: TENANTS[n % 3] for n, job_id in enumerate(ids)}

    # kill -9, in the middle of a shard that has flushed something.
    mine = fleet.registered(first)
    assert (mine.worker.engines, mine.worker.queues, mine.worker.slots) == (("onnx",), ("onnx",), 2)

    def flushed() -> bool:
        return any(
            shard.n_done and shard.state == ShardState.RUNNING and shard.lease_owner == mine.worker.id
            for job_id in ids[:6]
            for shard in _shards(fleet, job_id)
        )

    # It is alone until then: no other worker can take the work before it has begun.
    wait_until(flushed, "a flush of the first worker", deadline=DEADLINE)
    second = fleet.start("onnx-worker")
    first.kill()
    redis.Redis.from_url(str(fleet.settings.broker_url)).flushall()

    # Whatever supervises it starts another one. The second one is drained meanwhile.
    third = fleet.start("onnx-worker")
    drained = fleet.registered(second).worker.id

    def begun() -> bool:
        return any(a.worker_id == drained for job_id in ids[:6] for a in fleet.client.job(job_id).attempts())

    wait_until(begun, "an attempt of the second worker", deadline=DEADLINE)
    done = fleet.rowmill("worker", "drain", drained, "--wait", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["drained"] == [drained]
    assert second.join() == 0, second.err
    states = [a.state for job_id in ids for a in fleet.client.job(job_id).attempts() if a.worker_id == drained]
    assert set(states) <= {AttemptState.SUCCEEDED, AttemptState.RELEASED}, "a drain costs nothing of the budget"

    # The broker is away; a job submitted meanwhile is planned all the same.
    fleet.registered(third)
    redis_server.kill()
    try:
        more = fleet.rowmill(
            *("job", "submit", s3.url("in/texts.parquet"), "-o", s3.url("out/10"), "-m", str(llama), "-t", "generate"),
            *("-p", "Say: {text}", "--sampling", "max_tokens=8", "--tenant", TENANTS[0]),
        )
        assert more.returncode == 0, more.stderr
        assert "broker does not answer" in more.stderr
        ids.append(more.stdout.strip())
        planned = lambda: fleet.client.job(ids[-1]).status().state is not JobState.VALIDATING  # noqa: E731
        wait_until(planned, "a plan without the broker", deadline=DEADLINE)
    finally:
        redis_server.start()

    for job_id in ids:
        fleet.completed(job_id)
    expected = rows
    for _ in range(ROUNDS):
        expected = np.tanh(expected @ weights)
    for n, job_id in enumerate(ids):
        table = fleet.table(job_id)
        assert table["error"].null_count == table.num_rows
        if n < 6:
            assert table["id"].to_pylist() == list(range(n_hard))
            found = np.concatenate([np.asarray(chunk.flatten()).reshape(len(chunk), -1) for chunk in table["y"].chunks])
            assert np.abs(found - expected).max() < 1e-2
        else:
            assert table["id"].to_pylist() == list(range(n_text))
            assert table["text"].to_pylist() == texts
            assert min(table["completion_tokens"].to_pylist()) >= 1
            assert table["output"].null_count == 0
    lost = [a for job_id in ids for a in fleet.client.job(job_id).attempts() if a.state is AttemptState.LOST]
    assert {attempt.worker_id for attempt in lost} == {mine.worker.id}
    assert [seen.worker.pid for seen in workers.listed(fleet.database) if seen.warm] != []
    vllm_row = fleet.registered(vllm)
    assert [item["engine"] for item in vllm_row.warm] == ["vllm"], "generate and chat share one engine"
    assert vllm_row.warm[0]["bytes"] > 100 * 2**20

    for process in (third, control, beat):
        process.signal(signal.SIGTERM)
    for process in (third, control):
        assert process.join() == 0, process.err
    # kill -9 of a worker takes its engine's processes with it.
    children = _descendants(vllm.pid)
    assert len(children) > 1
    vllm.kill()
    wait_until(lambda: not [pid for pid in children if _runs(pid)], "the end of the engine's processes")
    alive = {seen.worker.id for seen in workers.listed(fleet.database) if seen.state == "alive"}
    assert alive <= {vllm_row.worker.id}


def _shards(fleet: Fleet, job_id: str) -> list[Any]:
    import sqlalchemy as sa

    from storage.sql import tables

    with fleet.database.read() as connection:
        return list(connection.execute(sa.select(tables.shard).where(tables.shard.c.job_id == job_id)))


def _descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _runs(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
