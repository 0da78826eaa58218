"""The processes of a chaos run: servers, workers and a beat, and what can be done to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psycopg
import redis

from pipeline.config.settings import Settings
from storage.sql import database
from tests import servers
from tests.chaos.schedule import END_SECONDS, LEASE_SECONDS, Fault, PlannedScript
from tests.chaos.scripts import Script
from tests.forged import FORGED

REPOSITORY = Path(__file__).resolve().parents[2]
WALL_CLOCKS = (0.0, 3600.0, -3600.0, 40 * 86400.0)
"""How far the wall clocks of a worker's incarnations are off, one after the other."""
_CLOCK = """
CREATE TABLE public.clock_step (hours int NOT NULL);
INSERT INTO public.clock_step VALUES (0);
CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
  'SELECT pg_catalog.clock_timestamp() + make_interval(hours => (SELECT hours FROM public.clock_step))';
ALTER DATABASE postgres SET search_path = public, pg_catalog;
"""
"""Puts a clock that can be set in the place of the server's own, for every connection from then on."""


class Cluster:
    """``step`` keeps it alive and carries out what is due; nothing in it blocks for longer than a server's start.

    ``counts`` says what was done, ``problems`` what must not have happened. Use as a context manager.
    """

    def __init__(self, home: Path, workers: int, scripts: list[PlannedScript]) -> None:
        self.home = home
        self.full = home / "full"
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        for name in ("postgres", "redis", "logs"):
            (home / name).mkdir(parents=True)
        self._postgres, url = servers.postgres(home / "postgres")
        self._redis, broker = servers.redis_server(home / "redis")
        self.settings = Settings(
            data_dir=home / "data",
            cache_dir=home / "cache",
            database_url=url,
            broker_url=broker,
            lease_seconds=LEASE_SECONDS,
            tick_seconds=1.0,
            flush_rows=50,
            read_batch_rows=10,
            # The schedule may hit the same shard again and again; that it then is given up is tested elsewhere.
            max_losses=1000,
            max_failures=1000,
        )
        self.scripts = [Script(home, number, planned, self.full) for number, planned in enumerate(scripts)]
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._down: list[servers.Server] = []
        self._workers = [_Celery(self, f"worker-{number}", _WORKER) for number in range(workers)]
        beat = ["beat", "-s", str(home / "beat.db")]
        self._beat = _Celery(self, "beat", beat)

    def __enter__(self) -> Cluster:
        self._postgres.start()
        database.upgrade(str(self.settings.database_url))
        self._sql(_CLOCK)
        self._redis.start()
        for process in (*self._workers, self._beat):
            process.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for script in self.scripts:
            script.stop()
        for process in (*self._workers, self._beat):
            process.end()
        self._redis.stop()
        self._postgres.stop()

    def do(self, fault: Fault) -> None:
        """Begin a fault. One that is under way already (the victim is stopped, the server is down) is left out."""
        worker = self._workers[fault.worker]
        match fault.name:
            case "kill a worker" if worker.alive:
                worker.signal(signal.SIGKILL)
            case "stop a worker" if worker.alive and not worker.stopped:
                worker.signal(signal.SIGSTOP)
                worker.stopped = True
                self._in(fault.seconds, worker.go_on)
            case "end a worker" if worker.alive and not worker.stopped and worker.told_to_end is None:
                worker.tell_to_end()
            case "flush the broker" if self._redis not in self._down:
                redis.Redis.from_url(str(self.settings.broker_url)).flushall()
            case "restart the broker" if self._redis not in self._down:
                self._redis.stop()
                self._back_in(fault.seconds, self._redis)
            case "take the broker away" if self._redis not in self._down:
                self._redis.kill()
                self._back_in(fault.seconds, self._redis)
            case "forge messages" if self._redis not in self._down:
                with redis.Redis.from_url(str(self.settings.broker_url)) as broker:
                    for queue in ("control", "fake"):
                        broker.lpush(queue, *FORGED)
            case "kill the database" if self._postgres not in self._down:
                self._postgres.kill()
                self._back_in(fault.seconds, self._postgres)
            case "kill the beat" if self._beat.alive:
                self._beat.signal(signal.SIGKILL)
            case "fill the disk" if not self.full.exists():
                self.full.touch()
                self._in(fault.seconds, self.full.unlink)
            case "step the clock" if self._postgres not in self._down:
                self._sql(f"UPDATE public.clock_step SET hours = {fault.hours}")
            case _:
                self.counts["left out"] += 1
                return
        self.counts[fault.name] += 1

    def step(self) -> None:
        """Whatever is due: servers come back, stopped workers go on, dead processes are started again."""
        now = time.monotonic()
        due = [item for item in self._later if item[0] <= now]
        self._later = [item for item in self._later if item[0] > now]
        for _, action in due:
            action()
        for process in (*self._workers, self._beat):
            process.look_after()
        for script in self.scripts:
            script.step()

    def calm(self) -> None:
        """No more faults: everything that is stopped or down comes back at once. The clock stays where it was set."""
        self._later = [(0.0, action) for _, action in self._later]
        for script in self.scripts:
            script.calm()
        self.step()

    def _sql(self, text: str) -> None:
        url = str(self.settings.database_url).replace("+psycopg", "")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(text.encode())

    def _in(self, seconds: float, action: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, action))

    def _back_in(self, seconds: float, server: servers.Server) -> None:
        self._down.append(server)
        self._in(seconds, lambda: self._start(server))

    def _start(self, server: servers.Server) -> None:
        # The children of a killed postmaster need a moment to notice; until then a new one refuses to start.
        for left in reversed(range(50)):
            try:
                server.start()
                break
            except RuntimeError:
                if not left:
                    raise
                time.sleep(0.1)
        self._down.remove(server)


_WORKER = [
    "worker",
    "--pool",
    "threads",
    "--concurrency",
    "2",
    "-Q",
    "control,fake",
    "--without-mingle",
    "--without-gossip",
]


class _Celery:
    """One Celery process, in all its incarnations; their output is in one log."""

    def __init__(self, cluster: Cluster, name: str, arguments: list[str]) -> None:
        self.stopped = False
        self.told_to_end: float | None = None
        self._cluster, self._name, self._arguments = cluster, name, arguments
        self._log = cluster.home / "logs" / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._incarnation = 0

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None and not self._killed

    def start(self) -> None:
        values = self._cluster.settings.model_dump(exclude_none=True, exclude_defaults=True, mode="json")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ROWMILL_")}
        for name, value in values.items():
            environment[f"ROWMILL_{name.upper()}"] = value if isinstance(value, str) else json.dumps(value)
        # Gone at once should this process be killed: nothing may outlive a chaos run.
        off = WALL_CLOCKS[self._incarnation % len(WALL_CLOCKS)]
        self._incarnation += 1
        celery = [str(self._cluster.full), str(off), *self._arguments, "--loglevel", "warning"]
        self._process = servers.start_beside("tests.chaos.process", celery, self._log, environment)
        self.stopped, self.told_to_end, self._killed = False, None, False

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._killed = self._killed or number is signal.SIGKILL
        self._process.send_signal(number)

    def tell_to_end(self) -> None:
        self.told_to_end = time.monotonic()
        self.signal(signal.SIGTERM)

    def go_on(self) -> None:
        """End a SIGSTOP (of this incarnation; a later one was not stopped)."""
        if self.stopped and self.alive:
            self.signal(signal.SIGCONT)
        self.stopped = False

    def look_after(self) -> None:
        """Start it again when it has ended; kill it when it does not end as it was told."""
        assert self._process is not None
        if self._process.poll() is None:
            if self.told_to_end is not None and time.monotonic() - self.told_to_end > END_SECONDS:
                self._cluster.problems.append(f"{self._name} did not end within {END_SECONDS:.0f} s of SIGTERM")
                self._cluster.counts["hung at SIGTERM"] += 1
                self.signal(signal.SIGKILL)
                self.told_to_end = None
            return
        if not self._killed and self.told_to_end is None:
            self._cluster.counts["ended by itself"] += 1
            self._cluster.problems.append(f"{self._name} ended by itself with code {self._process.returncode}")
        self._cluster.counts["started again"] += 1
        self.start()

    def end(self) -> None:
        """For good."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
