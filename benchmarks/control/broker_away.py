"""What a fleet loses while the broker is away: rows per second of a busy worker, and how long a small job takes on an
idle one, with Redis and without.

A real worker with its control process, on PostgreSQL and Redis, with the ``fake`` engine. Promised is that a busy
worker computes at least 0.9 times as many rows per second while Redis is down (``--seconds 600``: for ten minutes).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.control.fleet import fresh, homes, server
from pipeline import Client
from pipeline.config.settings import Settings
from tests import servers

KEPT = 0.9
ROWS_PER_SHARD = 20
ROUNDS = 5


@contextmanager
def worker(settings: dict[str, str], home: Path) -> Iterator[None]:
    command = [
        sys.executable,
        "-m",
        "tasks.worker",
        "--queues",
        "fake",
        "--engines",
        "fake",
        "--slots",
        "2",
        "--control",
    ]
    environment = os.environ | {f"ROWMILL_{name.upper()}": value for name, value in settings.items()}
    with (home / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)


def write(home: Path, n_rows: int) -> str:
    path = home / f"{n_rows}.parquet"
    pq.write_table(pa.table({"text": [f"t{n}" for n in range(n_rows)]}), path)
    return str(path)


def rate(client: Client, job_id: str, seconds: float) -> float:
    """Rows committed per second from now on."""
    began, before = time.perf_counter(), client.job(job_id).status().rows_done
    time.sleep(seconds)
    return (client.job(job_id).status().rows_done - before) / (time.perf_counter() - began)


def latency(client: Client, fields: dict[str, Any], name: str) -> float:
    """Median seconds from the submission of a job of one shard to its end."""
    took = []
    for number in range(ROUNDS):
        began = time.perf_counter()
        client.submit(**fields | {"output": f"{fields['output']}-{name}-{number}"}).wait(timeout=120)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each rate is measured")
    seconds = parser.parse_args().seconds
    with homes() as home, server(home) as url:
        (home / "redis").mkdir()
        broker, broker_url = servers.redis_server(home / "redis")
        broker.start()
        settings = {
            "database_url": fresh(url, "away"),
            "broker_url": broker_url,
            "data_dir": str(home / "data"),
            "cache_dir": str(home / "cache"),
        }
        fields = {"model": "fake", "task": "generate", "prompt": "{text}", "shard_rows": ROWS_PER_SHARD}
        small = fields | {"input": write(home, ROWS_PER_SHARD), "output": str(home / "small")}
        # Two slots, a shard in about half a second: twice as many as can be done.
        big = fields | {"input": write(home, int(8 * ROWS_PER_SHARD * (2 * seconds + 60))), "output": str(home / "big")}
        with worker(settings, home), Client(settings=Settings(**settings)) as client:  # type: ignore[arg-type]
            latency(client, small, "warm")
            with_broker = latency(client, small, "with")
            broker.kill()
            without = latency(client, small, "without")
            broker.start()
            print(f"a job of one shard on an idle worker: {with_broker:.1f} s with Redis, {without:.1f} s without")
            job = client.submit(**big, engine_options={"delay_ms_per_batch": 500})
            while not client.job(job.id).status().rows_done:
                time.sleep(0.5)
            before = rate(client, job.id, seconds)
            broker.kill()
            away = rate(client, job.id, seconds)
            job.cancel()
        broker.stop()
    print(f"rows per second of a busy one: {before:.1f} with Redis, {away:.1f} without: {away / before:.2f}")
    sys.exit(0 if away >= KEPT * before else 1)


if __name__ == "__main__":
    main()
