"""What shall happen, and when: drawn from the seed alone, before anything is started. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEASE_SECONDS = 3.0
END_SECONDS = 30.0
"""How long a process may take to end after it was told to before it counts as hung."""
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
    "fill the disk": 10,
    "step the clock": 6,
}
"""Each fault, and how often it comes compared with the others."""
CLOCK_HOURS = (-5, -1, 0, 0, 1, 2, 5)
"""How far the database's clock is off after a step. Whole hours: see ``Verdict.waited``."""
SCRIPTS = 2
"""Scripts that run beside the fleet at any time, each with a database of its own."""
ENDS = ("falls off the end", "exits", "raises", "SIGTERM", "SIGINT", "SIGKILL")
"""How a script ends before its job has: by itself, or by a signal while it waits."""


@dataclass(frozen=True)
class Fault:
    """``seconds`` is how long it lasts: a worker stopped, a server down, a disk full. ``worker`` is the number of the
    victim. ``hours`` is how far the clock is off from then on."""

    at: float
    name: str
    worker: int = 0
    seconds: float = 0.0
    hours: int = 0


@dataclass(frozen=True)
class PlannedJob:
    """``cancel_after`` is counted from its submission; ``retry`` follows when it has ended, all rows or failed ones."""

    at: float
    fields: Mapping[str, Any]
    cancel_after: float | None = None
    retry: str | None = None


@dataclass(frozen=True)
class PlannedTimetable:
    """A schedule of Rowmill's: its cron expression and options, and the fields of its jobs."""

    cron: str
    fields: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class End:
    """How one run of a script ends, and how many seconds after it began to wait."""

    how: str
    after: float


@dataclass(frozen=True)
class PlannedScript:
    """A user's script with an embedded client: its jobs, one after the other, and how its runs end, over and over."""

    jobs: Sequence[Mapping[str, Any]]
    ends: list[End]


@dataclass(frozen=True)
class Schedule:
    faults: list[Fault] = field(default_factory=list)
    jobs: list[PlannedJob] = field(default_factory=list)
    timetables: list[PlannedTimetable] = field(default_factory=list)
    scripts: list[PlannedScript] = field(default_factory=list)


def draw(seed: int, seconds: float, workers: int, job_every: float) -> Schedule:
    """The same arguments give the same schedule."""
    dice = random.Random(seed)
    schedule = Schedule()
    at = 0.0
    while at < seconds * 0.85:
        schedule.jobs.append(_job(dice, at))
        at += dice.uniform(0.5, 1.5) * job_every
    schedule.timetables.extend(_timetables(dice))
    schedule.scripts.extend(_script(dice) for _ in range(SCRIPTS))
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
            "fill the disk": dice.uniform(1.0, 8.0),
        }
        hours = dice.choice(CLOCK_HOURS)
        schedule.faults.append(Fault(at, name, dice.randrange(workers), lasts.get(name, 0.0), hours))


def _job(dice: random.Random, at: float) -> PlannedJob:
    fields = _fields(dice, 2500)
    cancel_after = dice.uniform(0.0, 8.0) if dice.random() < 0.5 else None
    retry = dice.choice(["failed", "all"]) if dice.random() < 0.5 else None
    return PlannedJob(at, fields, cancel_after, retry)


def _timetables(dice: random.Random) -> list[PlannedTimetable]:
    """One that goes on with the newest time after a step of the clock, and one that makes up for all of them."""
    overlap = dice.choice(["skip", "queue", "cancel-previous"])
    return [
        PlannedTimetable("* * * * *", _fields(dice, 600), {"overlap": overlap}),
        PlannedTimetable("*/30 * * * *", _fields(dice, 310), {"overlap": "queue", "misfire": "all"}),
    ]


def _script(dice: random.Random) -> PlannedScript:
    jobs = [_fields(dice, 1200) for _ in range(50)]
    ends = [End(dice.choice(ENDS), dice.uniform(0.0, 5.0)) for _ in range(500)]
    return PlannedScript(jobs, ends)


def _fields(dice: random.Random, most_rows: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"n_rows": dice.randint(300, most_rows), "shard_rows": dice.choice([100, 250, 400])}
    # JSONL is converted by whoever plans the job, and two workers may do so at the same time.
    fields["format"] = dice.choice(["parquet", "parquet", "jsonl"])
    fields["task"] = dice.choice(["generate", "generate", "embed"])
    # Some rows fail, always the same ones; and what was flushed need not be in the order of the rows.
    fields["engine_options"] = {
        "delay_ms_per_batch": dice.choice([50, 100, 150]),
        "shuffle": dice.random() < 0.5,
        "fail_rows_matching": dice.choice(["7 of", "13 of", "no such text"]),
    }
    return fields
