"""Faults that no failpoint can raise: a process of the driver with something wrong in it, and a worker in this one.

``python -m tests.faults.sabotage WHAT REQUEST`` is ``python -m tests.faults.driver REQUEST`` after ``WHAT`` (JSON) was
done to the process; see the functions of its names.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pipeline.engines.base import Cancellation, ResultBatch, RowBatch
from pipeline.engines.fake.engine import FakeEngine
from pipeline.output import assemble
from pipeline.spec.job_spec import JobSpec
from pipeline.worker.worker import Worker
from storage import failpoints
from storage.objects import local_files, new_file
from storage.parquet import parquet
from storage.states import TERMINAL_JOB
from tests.faults import driver
from tests.faults.driver import Process, World, wait_until


def sabotaged(
    world: World, what: Mapping[str, Any], *, arm: Mapping[str, str] | None = None, run: Mapping[str, Any] | None = None
) -> Process:
    """A worker process with something wrong in it; an embedded one when ``run`` gives it the fields of a job."""
    kind, given = ("worker", {"queue": "fake"}) if run is None else ("run", run)
    request = json.dumps({"kind": kind, "given": given, "arm": arm or {}})
    command = ["-m", "tests.faults.sabotage", json.dumps(what), request]
    return world._started(command, "sabotaged", world.settings)


def work(world: World, job_id: str) -> None:
    """Be the worker in this process until the job has ended."""
    worker = Worker(world.settings)

    def round_again() -> bool:
        worker.tick()
        worker.run("fake")
        worker.finalize()
        return world.job(job_id).state in TERMINAL_JOB

    try:
        wait_until(round_again, f"the end of job {job_id}", pause=0.1)
    finally:
        worker.close()


def clock(first: float, then: float) -> None:
    """The wall clock is off by ``first`` seconds, and after the first flush by ``then``."""
    shift = first
    wall, wall_ns = time.time, time.time_ns

    def jump() -> None:
        nonlocal shift
        shift = then

    time.time = lambda: wall() + shift
    time.time_ns = lambda: wall_ns() + int(shift * 1e9)
    failpoints.arm("flush.recorded", jump)


def file_limit(name: str, limit: int) -> None:
    """The first file of this name cannot grow beyond ``limit`` bytes: what does not fit is refused by the kernel."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    def free() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    once = _Once(name)
    original_open, original_close = local_files.open_temporary, new_file.NewFile.close

    def open_temporary(target: Path) -> tuple[IO[bytes], Path]:
        made = original_open(target)
        if once.mine(target):
            limited()
        return made

    def close(self: new_file.NewFile) -> None:
        try:
            original_close(self)
        finally:
            free()

    local_files.open_temporary = open_temporary
    new_file.NewFile.close = close  # type: ignore[method-assign]


class _Once:
    """True once: for the first file of this name."""

    def __init__(self, name: str) -> None:
        self._name, self._left = name, 1

    def mine(self, target: Path) -> bool:
        if target.name != self._name or not self._left:
            return False
        self._left = 0
        return True


def small_uploads() -> None:
    """Uploads to S3 go in pieces of 5 MiB, the least that it takes."""
    import s3fs

    s3fs.core.calculate_chunksize = lambda *_, **__: 5 * 2**20


def die(where: str) -> None:
    """The process ends at this place, and says nothing."""

    def end(*_: Any, **__: Any) -> Any:
        os._exit(driver.KILLED)

    infer = FakeEngine.infer

    def before_any_row(*_: Any) -> Iterator[ResultBatch]:
        yield end()

    def with_rows_inside(
        engine: FakeEngine, spec: JobSpec, rows: Iterator[RowBatch], cancel: Cancellation
    ) -> Iterator[ResultBatch]:
        next(rows)
        yield end()

    def after_all_rows(*arguments: Any) -> Iterator[ResultBatch]:
        yield from infer(*arguments)
        end()

    match where:
        case "load" | "result_schema" | "stats":
            setattr(FakeEngine, where, end)
        case "reading":
            parquet.read = end
        case "assembling":
            assemble.assemble = end
        case _:
            ways = (before_any_row, with_rows_inside, after_all_rows)
            FakeEngine.infer = {way.__name__: way for way in ways}[where]  # type: ignore[method-assign, assignment]


WHAT: Mapping[str, Callable[..., None]] = {
    "clock": clock,
    "die": die,
    "file_limit": file_limit,
    "small_uploads": small_uploads,
}


if __name__ == "__main__":
    for name, arguments in json.loads(sys.argv[1]).items():
        WHAT[name](*arguments)
    sys.exit(driver.main(sys.argv[2]))
