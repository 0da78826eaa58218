"""What the benchmarks of the control plane share: databases full of shards, and claimers that only claim and commit."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import sqlalchemy as sa
from pyroaring import BitMap

from storage.queue import attempts, claims
from storage.records import OUTPUT_SEQ, Claim, PartFile
from storage.sql import database, tables
from storage.sql.database import Database
from tests import servers

LEASE = 3600.0
ROWS = 10
_DIGITS = {"postgresql": "lpad(CAST(i AS text), 7, '0')", "sqlite": "printf('%07d', i)"}
_NUMBERS = {
    "postgresql": "generate_series(0, :n - 1) AS g(i)",
    "sqlite": "(WITH RECURSIVE g(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM g WHERE i < :n - 1) SELECT i FROM g) AS g",
}


@contextmanager
def homes() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rowmill-fleet-") as name:
        Path(name).chmod(0o755)  # PostgreSQL runs as another user when this does as root
        yield Path(name)


@contextmanager
def server(home: Path) -> Iterator[str]:
    """URL of a PostgreSQL server's ``postgres`` database (``fsync`` off: see ``tests/servers.py``)."""
    (home / "server").mkdir()
    process, url = servers.postgres(home / "server")
    process.start()
    try:
        yield url
    finally:
        process.stop()


def fresh(url: str, name: str) -> str:
    """A migrated database of that name on the server, or next to the file; its URL."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "postgresql":
        engine = sa.create_engine(parsed, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        made = parsed.set(database=name)
    else:
        made = parsed.set(database=str(Path(str(parsed.database)).with_name(f"{name}.db")))
    text = made.render_as_string(hide_password=False)
    database.upgrade(text)
    return text


def fill(url: str, n_shards: int, *, tenants: Sequence[str] = ("a", "b", "c"), keys: int = 2, first: int = 0) -> None:
    """``n_shards`` ready shards of ``ROWS`` rows, in one job for each tenant and engine, inserted by the database."""
    opened = Database(url)
    each = max(1, n_shards // (len(tenants) * keys))
    with opened.write() as connection:
        kind = connection.dialect.name
        at = connection.execute(sa.select(database.now())).scalar_one()
        for tenant in tenants:
            known = sa.select(tables.tenant.c.name).where(tables.tenant.c.name == tenant)
            if connection.execute(known).first() is None:
                connection.execute(tables.tenant.insert().values(name=tenant, created_at=at))
            for key in range(keys):
                job = f"{first:04d}-{tenant}-{key}"
                connection.execute(
                    tables.job.insert().values(
                        id=job, tenant=tenant, state="in_progress", priority=0, queue="fake", engine="fake",
                        engine_key=f"key{key}", spec={"task": "generate"}, spec_hash="hash", output_uri=f"/out/{job}",
                        created_at=at, n_shards=each, n_open=each, rows_total=each * ROWS,
                    )
                )  # fmt: skip
                connection.execute(
                    sa.text(
                        "INSERT INTO shard (id, job_id, gen, idx, tenant, queue, priority, engine_key, run_after, "
                        "state, row_start, row_n, slices) "
                        f"SELECT '{job}.00.' || {_DIGITS[kind]}, '{job}', 0, i, '{tenant}', 'fake', 0, 'key{key}', "
                        f":at, 'ready', i * {ROWS}, {ROWS}, '[[0, 0, {ROWS}]]' FROM {_NUMBERS[kind]}"
                    ),
                    {"n": each, "at": at},
                )
    if not opened.sqlite:
        with opened._writer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("VACUUM ANALYZE"))
    opened.close()


def claim_one(opened: Database, owner: str, warm: Sequence[str] = ("key0",)) -> Claim | None:
    return claims.claim(opened, owner=owner, lease_seconds=LEASE, queues=["fake"], warm=warm)


def commit(opened: Database, claim: Claim) -> None:
    every = BitMap(range(claim.shard.row_n))
    uri = f"/out/{claim.shard.id}"
    output = PartFile(claim.attempt_no, OUTPUT_SEQ, uri, 1, "sha", "etag", every, BitMap())
    attempts.commit(opened, claim, output, stats={})


def cycle(opened: Database, owner: str, count: int) -> float:
    """Seconds for ``count`` claims, each committed."""
    began = time.perf_counter()
    for _ in range(count):
        claim = claim_one(opened, owner)
        assert claim is not None, "the shards ran out"
        commit(opened, claim)
    return time.perf_counter() - began


def throughput(url: str, claimers: int, seconds: float) -> float:
    """Claims with their commits per second, by so many processes at once."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(claimers)
    ends, processes = [], []
    for number in range(claimers):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_claimer, args=(url, f"w{number}", seconds, start, send))
        process.start()
        ends.append(receive)
        processes.append(process)
    rates = [end.recv() for end in ends]
    for process in processes:
        process.join()
    return float(sum(rates))


def _claimer(url: str, owner: str, seconds: float, start: Barrier, result: Connection) -> None:
    opened = Database(url)
    cycle(opened, owner, 3)  # connections, prepared statements
    start.wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        claim = claim_one(opened, owner)
        if claim is not None:
            commit(opened, claim)
            done += 1
    result.send(done / (time.perf_counter() - began))
    opened.close()
