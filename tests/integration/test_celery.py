"""A real worker process on Redis and PostgreSQL: wake-ups in, rows out, and nothing rests on the broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from pipeline import Client
from pipeline.config.settings import Settings
from storage.states import JobState

pytestmark = pytest.mark.postgres


@contextmanager
def celery(settings: dict[str, str], log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "celery", "-A", "tasks.app", *arguments]
    environment = os.environ | {f"ROWMILL_{name.upper()}": value for name, value in settings.items()}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@pytest.fixture
def settings(postgres_database: str, redis_url: str, tmp_path: Path, cache_dir: Path) -> dict[str, str]:
    return {
        "database_url": postgres_database,
        "broker_url": redis_url,
        "data_dir": str(tmp_path / "data"),
        "cache_dir": str(cache_dir),
        "lease_seconds": "30",
        "tick_seconds": "1",
    }


def worker(settings: dict[str, str], log: Path) -> Any:
    options = ("--pool", "threads", "--concurrency", "2", "-Q", "control,fake", "--loglevel", "warning")
    return celery(settings, log, "worker", *options)


def test_a_worker_runs_what_another_process_submits(settings: dict[str, str], tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"t{n}" for n in range(500)]}), tmp_path / "in.parquet")
    source = str(tmp_path / "in.parquet")
    job: dict[str, Any] = {"input": source, "model": "fake", "task": "generate", "prompt": "{text}", "shard_rows": 60}
    with Client(settings=Settings(**settings)) as client:  # type: ignore[arg-type]
        # Submitted before any worker is there; the wake-ups of the second job are then thrown away.
        first = client.submit(**job, output=str(tmp_path / "one"))
        second = client.submit(**job, output=str(tmp_path / "two"))
        redis.Redis.from_url(settings["broker_url"]).flushall()
        beat = celery(settings, tmp_path / "beat.log", "beat", "-s", str(tmp_path / "beat.db"), "--loglevel", "warning")
        with worker(settings, tmp_path / "worker.log"), beat:
            for handle in (first, second):
                status = handle.wait(timeout=120)
                assert status.rows_done == 500
                assert handle.table().column("text").to_pylist() == [f"t{n}" for n in range(500)]
    assert b"Traceback" not in (tmp_path / "worker.log").read_bytes()


def test_a_cancel_needs_no_worker(settings: dict[str, str], tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"t{n}" for n in range(50)]}), tmp_path / "in.parquet")
    job = {"input": str(tmp_path / "in.parquet"), "model": "fake", "task": "generate", "prompt": "{text}"}
    with Client(settings=Settings(**settings)) as client:  # type: ignore[arg-type]
        handle = client.submit(**job, output=str(tmp_path / "out"))
        assert handle.cancel().state is JobState.CANCELLED
