"""What shall happen, and when: drawn from the seed alone, before anything is started. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LEASE_SECONDS = 3.0
FAULTS = {
    "kill a worker": 30,
    "stop a worker": 20,
    "end a worker": 15,
    "flush the broker": 10,
    "restart the broker": 8,
    "take the broker away": 10,
    "forge messages": 12,
    "kill the database": 8,
    "kill the beat": 4,
}
"""Each fault, and how often it comes compared with the others."""


@dataclass(frozen=True)
class Fault:
    """``seconds`` is how long it lasts: a worker stopped, a server down. ``worker`` is the number of the victim."""

    at: float
    name: str
    worker: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class PlannedJob:
    """``cancel_after`` is counted from its submission; ``retry`` follows when it has ended, all rows or failed ones."""

    at: float
    fields: Mapping[str, Any]
    cancel_after: float | None = None
    retry: str | None = None


@dataclass(frozen=True)
class Schedule:
    faults: list[Fault] = field(default_factory=list)
    jobs: list[PlannedJob] = field(default_factory=list)


def draw(seed: int, seconds: float, workers: int, job_every: float) -> Schedule:
    """The same arguments give the same schedule."""
    dice = random.Random(seed)
    schedule = Schedule()
    at = 0.0
    while at < seconds * 0.85:
        schedule.jobs.append(_job(dice, at))
        at += dice.uniform(0.5, 1.5) * job_every
    at = 5.0
    while True:
        at += dice.uniform(0.5, 4.0)
        if at >= seconds:
            return schedule
        name = dice.choices(list(FAULTS), list(FAULTS.values()))[0]
        lasts = {
            "stop a worker": dice.uniform(1.3, 4.0) * LEASE_SECONDS,
            "restart the broker": dice.uniform(0.1, 4.0),
            "take the broker away": dice.uniform(10.0, 30.0),
            "kill the database": dice.choice([0.0, 1.0, 1.5 * LEASE_SECONDS]),
        }
        schedule.faults.append(Fault(at, name, dice.randrange(workers), lasts.get(name, 0.0)))


def _job(dice: random.Random, at: float) -> PlannedJob:
    fields: dict[str, Any] = {"n_rows": dice.randint(300, 2500), "shard_rows": dice.choice([100, 250, 400])}
    # JSONL is converted by whoever plans the job, and two workers may do so at the same time.
    fields["format"] = dice.choice(["parquet", "parquet", "jsonl"])
    fields["task"] = dice.choice(["generate", "generate", "embed"])
    # Some rows fail, always the same ones; and what was flushed need not be in the order of the rows.
    fields["engine_options"] = {
        "delay_ms_per_batch": dice.choice([50, 100, 150]),
        "shuffle": dice.random() < 0.5,
        "fail_rows_matching": dice.choice(["7 of", "13 of", "no such text"]),
    }
    cancel_after = dice.uniform(0.0, 8.0) if dice.random() < 0.5 else None
    retry = dice.choice(["failed", "all"]) if dice.random() < 0.5 else None
    return PlannedJob(at, fields, cancel_after, retry)
