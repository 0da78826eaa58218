"""Real processes that run jobs and die on request: what every test of the fault matrix starts and looks at.

In a test (``world`` comes from ``conftest.py`` and runs the test on SQLite and on PostgreSQL)::

    job = world.submit(shard_rows=100)                       # planned and queued; nothing runs yet
    first = world.worker(arm={"flush.recorded": "stop@2"})   # a real process, which stops itself at the second flush
    wait_stopped(first)
    first.kill()                                             # SIGKILL
    with world.worker() as second:
        world.wait(job, JobState.COMPLETED)
    world.check(job)                                         # the output row by row, and the sums of the attempts

Three kinds of process, all started by this module as ``python -m tests.faults.driver`` (``celery``: as ``celery -A
tasks.app``):

``worker``  the ``pipeline.worker.worker.Worker`` that Celery's tasks call, in a loop in place of Celery: tick, plan,
            run, finalize. On both databases; ends on SIGTERM by ``Worker.close``.
``run``     the embedded mode: ``Client().run(**fields)``; prints the final status as JSON, or ends with code 3 and the
            error's class and text on stderr.
``tick``    ``run_maintenance`` each time a file with the next number appears: see ``_tick``.
``celery``  a real Celery worker or beat (PostgreSQL and Redis).

``arm`` maps a failpoint (``storage.failpoints.POINTS``) to an action, with ``@n`` for its n-th hit alone:
``"exit"`` (``os._exit(137)``), ``"stop"`` (SIGSTOP to itself, outside of transactions: every thread stands still until
SIGCONT), ``"wait:PATH"`` (creates ``PATH.reached``, then waits until PATH exists), ``"touch:PATH"``, ``"transient"``
and ``"dead"`` (raise ``TransientError``, ``EngineDead``), ``"disk_full"`` (raises ``OSError`` ENOSPC).
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.jobs.submit import submit_job
from pipeline.process.runtime import start
from pipeline.worker import maintenance
from storage import failpoints
from storage.errors import EngineDead, RowmillError, TransientError
from storage.fleet import reports
from storage.queue import jobs, reaper
from storage.records import Attempt, Job
from storage.sql import tables
from storage.sql.database import Database, now
from storage.states import AttemptState, JobState
from tests.forks import Fork

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE = 60.0
"""Seconds until a wait gives up: far above what anything here takes."""
KILLED = 137

T = TypeVar("T")

_EXPECTED: dict[bytes, pa.Table] = {}


# --- waiting ---------------------------------------------------------------------------------------------------------


def wait_until(
    predicate: Callable[[], T], what: str = "the condition", *, deadline: float = DEADLINE, pause: float = 0.02
) -> T:
    """The first true value of ``predicate``, asked every ``pause`` seconds; ``AssertionError`` after ``deadline``."""
    end = time.monotonic() + deadline
    while not (value := predicate()):
        assert time.monotonic() < end, f"{what} did not come true within {deadline} seconds"
        time.sleep(pause)
    return value


class Process:
    """A started process. Leaving the block ends it (SIGCONT, SIGTERM, then SIGKILL); its output is in ``log``.

    A command that begins with ``-m`` is Python's (``tests.forks``).
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        out = log.with_suffix(".out")
        self._popen: subprocess.Popen[bytes] | Fork
        if command[0] == "-m":
            self._popen = Fork(command[1:], environment, out, log, REPOSITORY)
        else:
            with log.open("wb") as err, out.open("wb") as data:
                self._popen = subprocess.Popen(
                    command, env=dict(environment), stdout=data, stderr=err, start_new_session=True, cwd=REPOSITORY
                )
        self.pid = self._popen.pid

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def out(self) -> str:
        """What it has written to stdout."""
        return self.log.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        """What it has written to stderr: its log."""
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to this process alone, and wait for it. Harmless when it has ended."""
        self._popen.kill()
        self._popen.wait(DEADLINE)

    def join(self, deadline: float = DEADLINE) -> int:
        """Wait for its own end; the exit code (negative: the signal that ended it)."""
        try:
            return self._popen.wait(deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {self.pid} did not end within {deadline} seconds:\n{self.err}") from None

    def running(self) -> bool:
        return self._popen.poll() is None

    def stopped(self) -> bool:
        """Whether it stands still after SIGSTOP."""
        assert self.running(), f"the process has ended with {self._popen.returncode}:\n{self.err}"
        return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    def end(self) -> int:
        """End it the polite way, then the other; its exit code."""
        if self.running():
            self._popen.send_signal(signal.SIGTERM)
            self._popen.send_signal(signal.SIGCONT)
            try:
                self._popen.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.pid, signal.SIGKILL)
        return self._popen.wait(DEADLINE)


def wait_stopped(process: Process) -> None:
    """Until the process stands still at a failpoint armed with ``"stop"`` (or after a SIGSTOP)."""
    wait_until(process.stopped, "the stop of the process")


def environment(settings: Settings) -> dict[str, str]:
    """The environment that gives a process these settings."""
    values = settings.model_dump(exclude_none=True, exclude_defaults=True, mode="json")
    out = {name: value for name, value in os.environ.items() if not name.startswith("ROWMILL_")}
    for name, value in values.items():
        out[f"ROWMILL_{name.upper()}"] = value if isinstance(value, str) else json.dumps(value)
    return out


# --- a job in its world ----------------------------------------------------------------------------------------------


@dataclass
class World:
    """Settings, an input of ``n_rows`` rows (row 7 has no text), an output, a client, and the processes of one test.

    ``settings`` has no broker unless a test sets one (``replace_settings``); all processes get what it says when they
    start. Batches of 5 rows and part files of 10, so that there is much to lose.
    """

    settings: Settings
    home: Path
    n_rows: int = 200
    fresh: bool = False
    """Whether its Python processes are interpreters of their own, whose writes wait for the disk, and no forks."""
    processes: list[Process] = field(default_factory=list)
    _client: Client | None = None

    def __post_init__(self) -> None:
        ids = range(self.n_rows)
        texts = [None if n == 7 else f"text number {n:05d}" for n in ids]
        table = pa.table({"id": pa.array(ids, pa.int64()), "text": texts, "tag": [n % 3 for n in ids]})
        pq.write_table(table, self.input, row_group_size=50)

    @property
    def input(self) -> Path:
        return self.home / "in.parquet"

    @property
    def output(self) -> Path:
        return self.home / "out"

    @property
    def client(self) -> Client:
        """A client in the test's own process: for looking."""
        if self._client is None:
            self._client = Client(settings=self.settings)
        return self._client

    @property
    def database(self) -> Database:
        return self.client._runtime.database

    def replace_settings(self, **values: Any) -> None:
        """Other settings for everything that starts from now on; forgets the client."""
        self.settings = self.settings.model_copy(update=values)
        if self._client is not None:
            self._client.close()
            self._client = None

    def fields(self, **more: Any) -> dict[str, Any]:
        """A job over the input; one shard unless ``shard_rows`` says otherwise."""
        base = {
            "input": str(self.input),
            "output": str(self.output),
            "model": "fake",
            "task": "generate",
            "prompt": "Say: {text}",
        }
        return base | more

    def submit(self, **more: Any) -> str:
        """Plan and queue a job without running any of it; its id."""
        return submit_job(self.client._runtime, self.fields(**more), plan=True).id

    # Processes.

    def worker(self, *, arm: Mapping[str, str] | None = None, **settings: Any) -> Process:
        """A worker process: ``Worker`` in a loop, with these settings on top of the world's."""
        return self.start("worker", {"queue": "fake"}, arm, settings)

    def run(
        self, *, arm: Mapping[str, str] | None = None, settings: Mapping[str, Any] | None = None, **fields: Any
    ) -> Process:
        """An embedded process: ``Client().run`` with :meth:`fields`."""
        return self.start("run", self.fields(**fields), arm, settings or {})

    def start(
        self, kind: str, given: Mapping[str, Any], arm: Mapping[str, str] | None, settings: Mapping[str, Any]
    ) -> Process:
        request = json.dumps({"kind": kind, "given": given, "arm": arm or {}})
        command = ["-m", "tests.faults.driver", request]
        return self._started(command, kind, self.settings.model_copy(update=settings))

    def celery(self, *arguments: str, **settings: Any) -> Process:
        """A real Celery process; ``"worker"`` consumes ``control`` and ``fake`` in two threads unless told not to."""
        kind, *rest = arguments
        defaults = {
            "worker": [
                "--pool",
                "threads",
                "--concurrency",
                "2",
                "-Q",
                "control,fake",
                "--without-mingle",
                "--without-gossip",
            ],
            "beat": ["-s", str(self.home / f"beat-{len(self.processes)}.db")],
        }[kind]
        command = ["-m", "celery", "-A", "tasks.app", kind, *defaults, "--loglevel", "warning", *rest]
        return self._started(command, kind, self.settings.model_copy(update=settings))

    def _started(self, command: Sequence[str], kind: str, settings: Settings) -> Process:
        log = self.home / f"{kind}-{len(self.processes)}.log"
        process = Process([sys.executable, *command] if self.fresh else command, environment(settings), log)
        self.processes.append(process)
        return process

    # Looking.

    def job(self, job_id: str) -> Job:
        return jobs.get(self.database, job_id)

    def attempts(self, job_id: str) -> list[Attempt]:
        """Every attempt, by shard and number."""
        return reports.attempts(self.database, job_id)

    def attempt_states(self, job_id: str) -> list[AttemptState]:
        return [attempt.state for attempt in self.attempts(job_id)]

    def rows(self, table: str, **where: Any) -> list[sa.Row[Any]]:
        """What a table of the database holds: ``world.rows("part_file", shard_id=…)``."""
        source = tables.metadata.tables[table]
        query = sa.select(source).where(*(source.c[name] == value for name, value in where.items()))
        with self.database.read() as connection:
            return list(connection.execute(query))

    def shards(self, job_id: str) -> list[sa.Row[Any]]:
        return sorted(self.rows("shard", job_id=job_id), key=lambda row: (row.gen, row.idx))

    def events(self, job_id: str, type_: str) -> int:
        """How many events of this type the job has."""
        return sum(event.type == type_ for event in jobs.events(self.database, job_id))

    def wait(self, job_id: str, *states: JobState) -> Job:
        """Until the job is in one of these states."""

        def there() -> Job | None:
            job = self.job(job_id)
            return job if job.state in states else None

        try:
            found = wait_until(there, f"job {job_id} in {', '.join(states)}")
        except AssertionError as error:
            logs = "\n".join(f"--- {p.log.name}\n{p.err}" for p in self.processes)
            raise AssertionError(f"{error}; it is {self.job(job_id)}\n{logs}") from None
        assert found is not None
        return found

    def wait_for_flushes(self, job_id: str, rows: int) -> None:
        """Until at least ``rows`` rows of the job are flushed."""
        wait_until(lambda: sum(shard.n_done for shard in self.shards(job_id)) >= rows, f"{rows} flushed rows")

    def wait_for_lease_end(self, job_id: str) -> None:
        """Until, by the database's clock, every lease on a running shard of the job has run out."""

        def over() -> bool:
            shard = tables.shard
            query = sa.select(sa.func.count()).where(
                shard.c.job_id == job_id, shard.c.state == "running", shard.c.lease_until >= now()
            )
            with self.database.read() as connection:
                return connection.execute(query).scalar_one() == 0

        wait_until(over, "the end of the leases")

    def reap(self) -> reaper.Reaped:
        """One round of the reaper, in the test's process."""
        settings = self.settings
        return reaper.reap(
            self.database, lease_seconds=settings.lease_seconds, max_losses=settings.max_losses, actor="test-reaper"
        )

    # Checking.

    def published(self) -> pa.Table:
        """The published output, its page checksums verified."""
        files = sorted((self.output / "data").glob("*.parquet"))
        assert files, f"nothing is published at {self.output}"
        return pa.concat_tables([pq.read_table(file, page_checksum_verification=True) for file in files])

    def expected(self) -> pa.Table:
        """What an undisturbed run in this process publishes: the same job with another output and no faults.

        Its own database and flushes of another size, so that nothing but the rows can make it equal. The same input
        has the same answer in every test.
        """
        read = self.input.read_bytes()
        if read not in _EXPECTED:
            calm = Settings(data_dir=self.home / "expected-data", cache_dir=self.settings.cache_dir)
            with Client(settings=calm) as client:
                client.run(**self.fields(output=str(self.home / "expected")))
            _EXPECTED[read] = pq.read_table(self.home / "expected/data")
        return _EXPECTED[read]

    def check(self, job_id: str, *, recomputed: int = 0, forgotten: int = 0, completed: int = 1) -> None:
        """The job completed, its output is the expected one row by row, and its counters and audit trail add up.

        ``recomputed``: how many rows may have been computed and flushed more than once. It is 0 everywhere but where
        a test says why not: what was flushed is never computed again. ``forgotten``: part files that were flushed and
        have been given up since. ``completed``: how many times the job completed, with those before a retry.
        """
        job = self.job(job_id)
        assert job.state is JobState.COMPLETED, job
        assert (self.output / "_SUCCESS").exists()
        found, expected = self.published(), self.expected()
        assert found.column("id").to_pylist() == list(range(self.n_rows))
        assert found.schema.equals(expected.schema)
        for name in expected.schema.names:
            assert found.column(name).to_pylist() == expected.column(name).to_pylist(), f"column {name!r} differs"
        manifest = json.loads((self.output / "_manifest.json").read_text())
        assert sum(part["rows"] for part in manifest["parts"]) == self.n_rows

        failed = sum(error is not None for error in expected.column("error").to_pylist())
        assert (job.rows_done, job.rows_failed, job.n_open, job.n_failed_shards) == (self.n_rows, failed, 0, 0)
        for name in ("prompt_tokens", "completion_tokens"):
            tokens = sum(value or 0 for value in expected.column(name).to_pylist())
            assert job.tokens[name] == tokens, f"{name} of the job are not those of its rows"
        attempts = self.attempts(job_id)
        computed = sum(attempt.rows_computed for attempt in attempts)
        assert self.n_rows <= computed <= self.n_rows + recomputed, f"{computed} rows were computed: {attempts}"
        succeeded = [attempt.shard_id for attempt in attempts if attempt.state is AttemptState.SUCCEEDED]
        shards = self.shards(job_id)
        assert sorted(succeeded) == sorted(shard.id for shard in shards), "not one successful attempt a shard"
        assert all(attempt.state is not AttemptState.RUNNING for attempt in attempts)
        assert sum(shard.attempt_no for shard in shards) == len(attempts)
        assert self.events(job_id, "shard.running") == len(attempts)
        assert self.events(job_id, "shard.committed") == len(shards)
        assert self.events(job_id, "job.completed") == completed
        parts = [part for shard in shards for part in self.rows("part_file", shard_id=shard.id) if part.seq >= 0]
        assert self.events(job_id, "shard.flush") == len(parts) + forgotten

    def close(self) -> None:
        """Kill every process that the test has left, and close the client."""
        for process in self.processes:
            process.kill()
        if self._client is not None:
            self._client.close()


# --- inside the started process --------------------------------------------------------------------------------------


def arm_all(arm: Mapping[str, str]) -> None:
    """Arm failpoints as :mod:`tests.faults.driver` says."""
    for point, script in arm.items():
        action, _, at = script.partition("@")
        failpoints.arm(point, _counted(_action(action), int(at) if at else None))


def _counted(action: Callable[[], object], at: int | None) -> Callable[[], object]:
    lock, hits = threading.Lock(), 0

    def hit() -> None:
        nonlocal hits
        with lock:
            hits += 1
            mine = at is None or hits == at
        if mine:
            action()

    return hit


def _action(text: str) -> Callable[[], object]:
    name, _, argument = text.partition(":")
    match name:
        case "exit":
            return lambda: os._exit(KILLED)
        case "stop":
            return _stop_outside_transactions()
        case "touch":
            return Path(argument).touch
        case "wait":
            return lambda: _wait_for(Path(argument))
        case "transient":
            return lambda: _raise(TransientError("scripted by the test"))
        case "dead":
            return lambda: _raise(EngineDead("scripted by the test"))
        case "disk_full":
            return lambda: _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    raise ValueError(f"no such action: {text!r}")


def _stop_outside_transactions() -> Callable[[], None]:
    """Stop when no thread of this process is inside a transaction: who sleeps there sleeps with its locks held."""
    lock = threading.RLock()
    sa.event.listen(sa.Pool, "checkout", lambda *_: lock.acquire())
    sa.event.listen(sa.Pool, "checkin", lambda *_: lock.release())

    def stop() -> None:
        with lock:
            # To this thread: after a signal to the process it might run on until another thread has taken it.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    return stop


def _wait_for(path: Path) -> None:
    Path(f"{path}.reached").touch()
    while not path.exists():
        time.sleep(0.01)


def _raise(error: BaseException) -> None:
    raise error


def _worker(queue: str) -> int:
    """Celery's tasks in a loop; a database that does not answer is what a failed task is to Celery: the next tick."""
    from pipeline.worker.worker import Worker

    over = threading.Event()
    worker = Worker(Settings(), engines=["fake"], queues=["control", "fake"], slots=1)

    def end(*_: object) -> None:
        over.set()
        threading.Thread(target=worker.drain).start()

    signal.signal(signal.SIGTERM, end)
    while not over.is_set():
        for step in (worker.tick, worker.plan, lambda: worker.run(queue), worker.finalize):
            if over.is_set():
                break
            try:
                step()
            except TransientError as error:
                print(f"the next round tries again: {error}", file=sys.stderr)
        over.wait(0.1)
    worker.close()
    return 0


def _run(fields: Mapping[str, Any]) -> int:
    try:
        with Client() as client:
            print(json.dumps(client.run(**fields).to_json()), flush=True)
    except RowmillError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 3
    return 0


def _tick(gates: str, answers: str) -> int:
    """Tick once for each file ``GATES.0``, ``GATES.1``, … as soon as it is there, and leave ``ANSWERS.0``, …"""
    runtime = start(Settings())
    for number in itertools.count():
        answer = Path(f"{answers}.{number}")
        answer.with_suffix(f".{number}.ready").touch()
        while not Path(f"{gates}.{number}").exists():
            time.sleep(0.001)
        answer.write_text(json.dumps(maintenance.run_maintenance(runtime)))
    return 0


def main(request: str) -> int:
    asked = json.loads(request)
    arm_all(asked["arm"])
    match asked["kind"]:
        case "worker":
            return _worker(**asked["given"])
        case "run":
            return _run(asked["given"])
        case "tick":
            return _tick(**asked["given"])
    raise ValueError(f"no such kind of process: {asked['kind']!r}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
