"""Users' scripts that run beside the fleet, each with a database of its own, and are started again when they ended."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config.settings import Settings
from storage.states import JobState
from tests import servers
from tests.chaos.client import Asked, job_fields
from tests.chaos.schedule import END_SECONDS, LEASE_SECONDS, End, PlannedJob, PlannedScript

TO_THE_END = End("runs to its end", 0.0)
NO_SPACE = "no space left"
_CODES = {
    "falls off the end": 0,
    "exits": 3,
    "raises": 1,
    "SIGTERM": -signal.SIGTERM,
    "SIGINT": -signal.SIGINT,
    "SIGKILL": -signal.SIGKILL,
    TO_THE_END.how: 0,
}
"""How a script ends in each way. One that waits may also find its job completed, and end with 0."""


class Script:
    """One of them, in all its runs. ``asked`` are its jobs so far, ``counts`` its ends, ``kills`` those by SIGKILL.

    ``step`` starts, ends and judges its processes, and never blocks.
    """

    def __init__(self, home: Path, number: int, planned: PlannedScript, full: Path) -> None:
        self.asked: list[Asked] = []
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.kills = 0
        self.settings = Settings(
            data_dir=home / f"script-{number}",
            cache_dir=home / "cache",
            lease_seconds=LEASE_SECONDS,
            flush_rows=50,
            read_batch_rows=10,
            max_losses=1000,
            max_failures=1000,
        )
        self.name = f"script-{number}"
        self._home, self._planned, self._full = home, planned, full
        self._log = home / "logs" / f"{self.name}.log"
        self._ends = iter(planned.ends)
        self._end = TO_THE_END
        self._calm = False
        self._process: subprocess.Popen[bytes] | None = None
        self._read = 0
        self._waits_since: float | None = None
        self._told_at: float | None = None

    @property
    def over(self) -> bool:
        """After the faults: its last job has completed."""
        return self._calm and self._process is None and bool(self.asked) and self.asked[-1].state is not None

    def calm(self) -> None:
        """No more faults: the job that is under way runs to its end."""
        self._calm = True

    def step(self) -> None:
        if self._process is None:
            if not self.over:
                self._start()
            return
        code = self._process.poll()
        if code is not None:
            self._process = None
            self._judge(code)
            return
        if self._waits_since is None and self._submitted():
            self._waits_since = time.monotonic()
        due = None if self._waits_since is None else self._waits_since + self._end.after
        if due is None or self._end is TO_THE_END or time.monotonic() < due:
            return
        if self._told_at is None:
            self._told_at = time.monotonic()
            if self._end.how.startswith("SIG"):
                self._process.send_signal(signal.Signals[self._end.how])
        elif time.monotonic() > self._told_at + END_SECONDS:
            self._process.send_signal(signal.SIGUSR1)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            self._process.kill()
            self._process.wait()
            self.problems.append(
                f"{self.name} hung for {END_SECONDS:.0f} s when it ended ({self._end.how}); see its log"
            )

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        if not self.asked or self.asked[-1].state is not None:
            self._next_job()
        self._end = TO_THE_END if self._calm else next(self._ends)
        for name in ("waits", "done"):
            self._marker(name).unlink(missing_ok=True)
        self._waits_since = self._told_at = None
        request: dict[str, Any] = {
            "settings": self.settings.model_dump(mode="json", exclude_defaults=True),
            "fields": self.asked[-1].fields,
            "full": str(self._full),
            "how": self._end.how,
            "after": self._end.after,
            "waits": str(self._marker("waits")),
            "done": str(self._marker("done")),
        }
        self._read = self._log.stat().st_size if self._log.exists() else 0
        self._process = servers.start_beside("tests.chaos.script", [json.dumps(request)], self._log)

    def _next_job(self) -> None:
        number = len(self.asked)
        name = f"{self.name}-{number}"
        fields = job_fields(self._home, name, self._planned.jobs[number]) | {"idempotency_key": name}
        self.asked.append(Asked(PlannedJob(0.0, fields), fields, Path(fields["output"]), name))

    def _judge(self, code: int) -> None:
        self._submitted()
        how, said = self._end.how, self._said()
        self.counts[how] += 1
        self.kills += code == -signal.SIGKILL
        if self._marker("done").exists():
            self.asked[-1].state = JobState.COMPLETED
        expected = {_CODES[how]} | ({0} if how.startswith("SIG") else set())
        if "KeyboardInterrupt" in said:
            expected.add(1)  # Python ends with either: it depends on where the exception came from
        if code not in expected and NO_SPACE not in said:
            self.problems.append(f"{self.name} ended with {code} ({how}): {said[-300:]!r}")
        if "defect" in said:
            self.problems.append(f"{self.name} speaks of a defect ({how}): {said[-300:]!r}")

    def _submitted(self) -> bool:
        """Whether the script waits for its job by now, whose id it has told."""
        waits = self._marker("waits")
        self.asked[-1].id = (waits.read_text() if waits.exists() else "") or self.asked[-1].id
        return waits.exists()

    def _said(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._read)
            return log.read().decode(errors="replace")

    def _marker(self, name: str) -> Path:
        return self._home / f"{self.name}-{name}"
