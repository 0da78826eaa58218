"""Workers in the database: what they say, who asks them to drain, who is forgotten. On SQLite and PostgreSQL."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from storage.errors import NotFound
from storage.fleet import workers
from storage.fleet.workers import Worker
from storage.queue import claims
from storage.sql import tables
from storage.sql.database import Database, now
from tests.storage.jobs_in_sql import planned_job

ONNX = Worker(
    "host:1:aaaa", "host", 1, 1.5, ("onnx",), ("onnx",), 2, 30.0, "0.1.0", offers={"onnx": ("CPUExecutionProvider",)}
)
CONTROL = Worker("host:2:bbbb", "host", 2, 1.5, (), ("control",), 0, 30.0, "0.1.0")


def _silence(database: Database, worker: Worker, seconds: float) -> None:
    with database.write() as connection:
        connection.execute(
            tables.worker.update().where(tables.worker.c.id == worker.id).values(heartbeat_at=now() - seconds)
        )


def test_a_worker_is_listed_as_it_registered(database: Database) -> None:
    workers.register(database, ONNX)
    workers.register(database, CONTROL)
    warm = [{"key": "k", "engine": "onnx", "model": "minilm", "bytes": 7}]
    assert workers.touch(database, ONNX.id, warm=warm) is False
    one, other = workers.listed(database)
    assert (one.worker, one.state, list(one.warm), one.holds) == (ONNX, "alive", warm, ())
    assert (other.worker, other.state, other.warm) == (CONTROL, "alive", ())
    assert workers.on_host(database, "host") == [ONNX, CONTROL]
    workers.register(database, ONNX)
    assert [seen.worker.id for seen in workers.listed(database)].count(ONNX.id) == 1


def test_it_holds_the_shards_that_it_has_claimed(database: Database) -> None:
    job = planned_job(database)
    workers.register(database, ONNX)
    claim = claims.claim(database, owner=ONNX.id, lease_seconds=30, job_id=job.id)
    assert claim is not None
    [seen] = workers.listed(database)
    assert seen.holds == (claim.shard.id,)


def test_a_heartbeat_says_whether_to_drain(database: Database) -> None:
    workers.register(database, ONNX)
    assert workers.touch(database, ONNX.id) is False
    assert workers.drain(database, [ONNX.id, "nobody"]) == [ONNX.id]
    assert workers.listed(database)[0].state == "draining"
    assert workers.touch(database, ONNX.id) is True
    workers.register(database, ONNX)
    assert workers.touch(database, ONNX.id, draining=True) is True, "it drains by itself"
    assert workers.touch(database, ONNX.id) is True, "and goes on to"
    workers.unregister(database, ONNX.id)
    assert workers.touch(database, ONNX.id) is None


def test_free_slots_are_those_of_live_workers_of_the_queue(database: Database) -> None:
    assert workers.free_slots(database, "onnx") == 0
    workers.register(database, ONNX)
    workers.register(database, CONTROL)
    assert workers.free_slots(database, "onnx") == 2
    assert workers.free_slots(database, "vllm") == 0
    claim = claims.claim(database, owner=ONNX.id, lease_seconds=30, job_id=planned_job(database).id)
    assert claim is not None
    assert workers.free_slots(database, "onnx") == 1
    workers.drain(database, [ONNX.id])
    assert workers.free_slots(database, "onnx") == 0
    workers.register(database, ONNX)
    assert workers.free_slots(database, "onnx") == 1
    _silence(database, ONNX, 31)
    assert workers.free_slots(database, "onnx") == 1, "perhaps it is only late"
    _silence(database, ONNX, 301)
    assert workers.free_slots(database, "onnx") == 0


def test_the_silent_are_shown_and_in_the_end_forgotten(database: Database) -> None:
    workers.register(database, ONNX)
    workers.register(database, CONTROL)
    _silence(database, ONNX, 31)
    assert [seen.state for seen in workers.listed(database)] == ["silent", "alive"]
    assert workers.forget_silent(database) == 0
    _silence(database, ONNX, workers.FORGET_SECONDS + 1)
    job = planned_job(database)
    claim = claims.claim(database, owner=ONNX.id, lease_seconds=30, job_id=job.id)
    assert claim is not None
    assert workers.forget_silent(database) == 0, "it holds a shard"
    with database.write() as connection:
        connection.execute(sa.update(tables.shard).values(lease_owner=CONTROL.id))
    assert workers.forget_silent(database) == 1
    assert [seen.worker for seen in workers.listed(database)] == [CONTROL]


def test_a_worker_is_found_by_a_part_of_its_id(database: Database) -> None:
    workers.register(database, ONNX)
    workers.register(database, CONTROL)
    assert workers.find(database, ONNX.id) == ONNX.id
    assert workers.find(database, "bbb") == CONTROL.id
    with pytest.raises(NotFound, match="several"):
        workers.find(database, "host")
    with pytest.raises(NotFound, match="worker list"):
        workers.find(database, "")
