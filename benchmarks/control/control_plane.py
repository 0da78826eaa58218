"""What the database can carry: claims and commits, as claimers and shards grow; planning; and what idling costs.

* ``throughput``: claims with their commits per second, by 1, 4 and 16 processes, for one tenant alone and for three
  that compete.
* ``growth``: the same by one claimer over 10³, 10⁴, 10⁵ and 10⁶ ready shards. Rounds of all sizes take turns in one
  run; promised is that the median ratio of the rates, largest to smallest, is 0.8 at least.
* ``lanes``: the same by how many tenants have shards ready, because that is what a claim's cost does grow with.
* ``planning``: 10⁹ rows in 10⁵ files, and 10⁸ in 10⁴. The footers are made up, all else is real; promised is that peak
  memory grows by less than ``PER_FILE`` bytes for every file more.
* ``poll``: what a look into the database costs that finds nothing to do: for a shard, for a job to plan, for one to
  publish. So much an idle worker costs every few seconds (``poll_seconds``).
* ``idle``: statements per tick of beat and per heartbeat of a worker that have nothing to do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import sqlalchemy as sa

from benchmarks.control.fleet import cycle, fill, fresh, homes, server, throughput
from pipeline.config.settings import Settings
from pipeline.inputs import discovery
from pipeline.inputs.formats import Format, Kind
from pipeline.planning import shard_plan
from pipeline.worker.worker import Worker
from storage.objects.store import ObjectInfo, ObjectStore
from storage.parquet import parquet
from storage.queue import claims, jobs, plan_leases, publish_leases
from storage.records import NewJob
from storage.sql.database import Database

FLAT = 0.8
PER_FILE = 1000
SIZES = (10**3, 10**4, 10**5, 10**6)
BLOCK = 20
"""Claims and commits timed at a time, before the next size has its turn."""


def measure_throughput(url: str, kind: str) -> None:
    for tenants in (("a",), ("a", "b", "c")):
        rates = []
        for claimers in (1, 4, 16):
            at = fresh(url, f"t{len(tenants)}_{claimers}")
            fill(at, 20_000, tenants=tenants)
            rates.append(throughput(at, claimers, 4.0))
        shown = "  ".join(f"{n:>2}: {rate:6.0f}/s" for n, rate in zip((1, 4, 16), rates, strict=True))
        print(f"  {kind:10} {'one tenant' if len(tenants) == 1 else 'three tenants':14} {shown}", flush=True)


def measure_growth(url: str, kind: str, rounds: int) -> bool:
    opened = {}
    for size in SIZES:
        at = fresh(url, f"g{size}")
        fill(at, size)
        opened[size] = Database(at)
    return compare(kind, {f"{size:,} shards": database for size, database in opened.items()}, rounds) >= FLAT


def measure_lanes(url: str, kind: str, rounds: int) -> None:
    opened = {}
    for count in (1, 10, 100):
        at = fresh(url, f"l{count}")
        fill(at, 10_000, tenants=[f"tenant-{n}" for n in range(count)], keys=1)
        opened[f"{count} tenants"] = Database(at)
    compare(kind, opened, rounds)


def compare(kind: str, opened: dict[str, Database], rounds: int) -> float:
    """Blocks of claims in turn; the median ratio of the last one's rate to the first one's."""
    seconds: dict[str, list[float]] = {name: [] for name in opened}
    for number in range(rounds + 1):
        for name, database in opened.items():
            took = cycle(database, "w", BLOCK)
            if number:  # the first is for warming up
                seconds[name].append(took)
    first = seconds[next(iter(opened))]
    ratio = 1.0
    for name, mine in seconds.items():
        ratios = [a / b for a, b in zip(first, mine, strict=True)]
        ratio = statistics.median(ratios)
        rate = BLOCK / statistics.median(mine)
        spread = statistics.quantiles(ratios, n=4)
        print(f"  {kind:10} {name:>17}: {rate:6.0f}/s, {ratio:.2f} of the first "
              f"(quartiles {spread[0]:.2f} to {spread[2]:.2f})", flush=True)  # fmt: skip
        opened[name].close()
    return ratio


def measure_planning(url: str, kind: str) -> bool:
    context = multiprocessing.get_context("fork")
    peaks = {}
    for n_files in (10**4, 10**5):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_plan, args=(fresh(url, f"p{n_files}"), n_files, send))
        process.start()
        rows, n_shards, seconds, peaks[n_files] = receive.recv()
        process.join()
        mib = peaks[n_files] / 2**20
        print(f"  {kind:10} {n_files:>7,} files, {rows:,} rows: {n_shards:,} shards in {seconds:.1f} s, "
              f"{mib:.0f} MiB more than before at the peak", flush=True)  # fmt: skip
    per_file = (peaks[10**5] - peaks[10**4]) / (10**5 - 10**4)
    print(f"  {kind:10} {per_file:,.0f} bytes for every file more (promised: less than {PER_FILE:,})", flush=True)
    return per_file < PER_FILE


def _plan(url: str, n_files: int, result: Connection) -> None:
    """Ten row groups of a thousand rows in every file: 10⁹ rows in 10⁵ files."""
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("text", pa.string())])

    def find(store: ObjectStore, pattern: str) -> list[ObjectInfo]:
        return [ObjectInfo(f"{pattern}/part-{n:07d}.parquet", 2_000_000 + n, f"etag-{n:032d}") for n in range(n_files)]

    def stats(store: ObjectStore, uri: str, *, check: bool) -> parquet.FileStats:
        return parquet.FileStats(10_000, schema, tuple((1000, len(uri) * 1000 + n) for n in range(10)))

    store = ObjectStore({})
    database = Database(url)
    job_id = "planned"
    new = NewJob(
        id=job_id, tenant="a", priority=0, queue="fake", engine="fake", engine_key="key", spec={}, spec_hash="hash",
        idempotency_key=None, output_uri="/out", max_failed_rows=None,
    )  # fmt: skip
    jobs.insert(database, new, window_seconds=3600.0, actor="benchmark")
    spec = mock.Mock(input=("s3://bucket/a/folder",), output="/out")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with (
        mock.patch.object(ObjectStore, "find", find),
        mock.patch.object(discovery, "format_of", lambda *_: Format(Kind.PARQUET)),
        mock.patch.object(parquet, "stats", stats),
    ):
        read = discovery.discover(store, spec, "/out/.rowmill/planned/")
    shards = shard_plan.plan(read.files, shard_rows=50_000, shard_bytes=2**28)
    job = jobs.set_planned(database, job_id, plan={"planned": True}, sources=read.sources, shards=shards, actor="b")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result.send((job.rows_total, job.n_shards, time.perf_counter() - began, (peak - before) * 1024))
    database.close()


def measure_poll(url: str, kind: str) -> None:
    """On an empty database, and beside a million shards that are ready on another queue."""
    for name, n_shards in (("empty", 0), ("10⁶ shards of others", 10**6)):
        at = fresh(url, f"poll{n_shards}")
        if n_shards:
            fill(at, n_shards)
        database = Database(at)
        who: dict[str, Any] = {"owner": "w", "lease_seconds": 60.0}
        looks: dict[str, Callable[[], object]] = {
            "shard": partial(claims.claim, database, queues=["idle"], **who),
            "plan": partial(plan_leases.claim, database, **who),
            "publish": partial(publish_leases.claim_finalize, database, **who),
        }
        shown = []
        for what, look in looks.items():
            statements: list[str] = []

            def count(connection: Any, cursor: Any, statement: str, *_: Any, into: list[str] = statements) -> None:
                into.append(statement)

            sa.event.listen(database._writer, "before_cursor_execute", count)
            assert look() is None
            sa.event.remove(database._writer, "before_cursor_execute", count)
            seconds = []
            for _ in range(300):
                began = time.perf_counter()
                look()
                seconds.append(time.perf_counter() - began)
            shown.append(f"{what} {1000 * statistics.median(seconds):.2f} ms in {len(statements)} statements")
        database.close()
        print(f"  {kind:10} {name:>20}: {', '.join(shown)}", flush=True)


def measure_idle() -> None:
    with tempfile.TemporaryDirectory(prefix="rowmill-idle-") as folder:
        settings = Settings(data_dir=Path(folder) / "data", cache_dir=Path(folder) / "cache")
        worker = Worker(settings)
        counts: list[str] = []
        database = worker.runtime.database
        for engine in (database._writer, database._reader):
            sa.event.listen(engine, "before_cursor_execute", lambda c, cu, statement, *_: counts.append(statement))
        rates = []
        for name, call, every in (
            ("tick of beat", worker.tick, settings.tick_seconds),
            ("heartbeat", worker._keeper.heartbeat, settings.lease_seconds / 3),
            ("wake-up in vain", lambda: worker.run("fake"), None),
        ):
            counts.clear()
            call()
            often = f"every {every:.0f} s: {len(counts) / every:.2f} a second" if every else "each"
            rates.append(len(counts))
            print(f"  {name:16} {len(counts):>3} statements, {often}", flush=True)
        worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parts = ("throughput", "growth", "lanes", "planning", "poll", "idle")
    parser.add_argument("--only", choices=parts, action="append")
    parser.add_argument("--database", choices=("postgresql", "sqlite"), action="append")
    options = parser.parse_args()
    kept = True
    for part in options.only or parts:
        print(part, flush=True)
        if part == "idle":
            measure_idle()
            continue
        for kind in options.database or ("postgresql", "sqlite"):
            with homes() as home:
                if kind == "sqlite":
                    kept &= measure(part, f"sqlite:///{home / 'x.db'}", kind, options.rounds)
                else:
                    with server(home) as url:
                        kept &= measure(part, url, kind, options.rounds)
    sys.exit(0 if kept else 1)


def measure(part: str, url: str, kind: str, rounds: int) -> bool:
    if part == "growth":
        return measure_growth(url, kind, rounds)
    if part == "planning":
        return measure_planning(url, kind)
    if part == "lanes":
        measure_lanes(url, kind, rounds)
    elif part == "poll":
        measure_poll(url, kind)
    else:
        measure_throughput(url, kind)
    return True


if __name__ == "__main__":
    main()
