"""Scripted faults of the ``fake`` engine: its options, and when each fault strikes.

A test says in ``engine_options`` what shall go wrong and where; nothing here is random. Rows are matched by their text:
the rendered prompt, the text column, or ``str()`` of a row's numbers.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError

from pipeline.engines.base import Cancellation
from storage.errors import EngineDead, InvalidJob, InvalidModel, TransientError

Count = Annotated[StrictInt, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]

GATE_POLL_SECONDS = 0.005
KILLED = 137
"""The exit code of a process that was killed with SIGKILL, as a shell has it."""


class FakeOptions(BaseModel):
    """What goes wrong. Without any of them nothing does.

    Counts hold per process and per distinct set of options, however many engines are built with them; with
    ``counts_dir`` the number of strikes of ``die_on``, ``transient_on``, ``crash_on`` and ``crash_after_rows`` is kept
    there and holds across processes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fail_rows_matching: Text | None = None
    """Rows whose text contains this fail with ``engine_refused``."""
    die_on: Text | None = None
    """The engine dies (``EngineDead``), for all its calls, on a batch with a row whose text contains this …"""
    die_times: Count = 1
    """… this many times."""
    transient_on: Text | None = None
    """A batch with a row whose text contains this raises ``TransientError`` …"""
    transient_times: Count = 1
    """… this many times."""
    refuse_load: Text | None = None
    """Loading fails (``InvalidModel``) with this message."""
    max_prompt_tokens: Count | None = None
    """Longer texts, in words, fail with ``prompt_too_long``, or are truncated: as the job's ``overlong`` has it."""
    slow_row: Text | None = None
    """A row whose text contains this takes …"""
    slow_row_ms: Annotated[StrictInt | StrictFloat, Field(ge=0, le=3_600_000)] = 0
    """… this long inside the engine, unless cancelled, or aborted after the job's ``request_timeout``."""
    delay_ms_per_batch: Annotated[StrictInt | StrictFloat, Field(ge=0, le=60_000)] = 0
    """Waits this long before each batch, unless cancelled."""
    gate_file: Text | None = None
    """Waits until this file exists, unless cancelled, …"""
    gate_after_rows: Annotated[StrictInt, Field(ge=0)] = 0
    """… once this many rows were handed over."""
    touch_after_rows: tuple[Count, Text] | None = None
    """``[n, path]``: creates that file once n rows were handed over: a signal for a waiting test."""
    crash_after_rows: Count | None = None
    """The whole process ends at once (exit code 137, nothing is cleaned up) when this many rows were handed over …"""
    crash_times: Count | None = None
    """… this many times; every time without it."""
    crash_on: Text | None = None
    """The whole process ends at once as well on a batch with a row whose text contains this, ``crash_times`` times."""
    counts_dir: Text | None = None
    """An existing directory in which strikes are counted, so that they hold across processes."""
    rows_file: Text | None = None
    """One byte is appended to this file for every row computed, whatever becomes of it: its size counts them all."""
    shuffle: StrictBool = False
    """Results come out of order: rows within a batch and batches among their neighbours, the same way every time."""
    drop_row: Text | None = None
    """Rows whose text contains this get no result: a broken engine."""
    double_row: Text | None = None
    """Rows whose text contains this get their result twice: a broken engine."""


def parse(options: Mapping[str, Any]) -> FakeOptions:
    """Validated options, or :class:`InvalidJob` naming the first one at fault and why."""
    try:
        return FakeOptions(**options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            what = f"unknown option of engine 'fake'; it has {', '.join(sorted(FakeOptions.model_fields))}"
        else:
            what = f"{first['msg']} (given: {first['input']!r})"
        raise InvalidJob(what, field=f"engine_options.{where}") from None


@dataclass(slots=True)
class _Counts:
    lock: threading.Lock = field(default_factory=threading.Lock)
    rows: int = 0
    strikes: dict[str, int] = field(default_factory=dict)


_counts: dict[str, _Counts] = {}
_counts_lock = threading.Lock()


class Faults:
    """The faults of one set of options. Safe to use from several threads."""

    def __init__(self, options: FakeOptions) -> None:
        self._options = options
        key = json.dumps(options.model_dump(mode="json"), sort_keys=True)
        with _counts_lock:
            self._counts = _counts.setdefault(key, _Counts())

    def on_load(self) -> None:
        """Raise :class:`InvalidModel` if the script says so."""
        if self._options.refuse_load is not None:
            raise InvalidModel(self._options.refuse_load, field="model")

    def before_batch(self, cancel: Cancellation) -> bool:
        """Wait for the delay and the gate; false when cancelled meanwhile."""
        options = self._options
        if options.delay_ms_per_batch and cancel.wait(options.delay_ms_per_batch / 1000):
            return False
        if options.gate_file is not None and self._counts.rows >= options.gate_after_rows:
            gate = Path(options.gate_file)
            while not gate.exists():
                if cancel.wait(GATE_POLL_SECONDS):
                    return False
        return not cancel.cancelled

    def aborted(self, texts: Sequence[str | None], timeout: float | None, cancel: Cancellation) -> list[int]:
        """Wait for the slow rows, one after the other; those that the timeout (seconds) ends before they are done."""
        options, late = self._options, []
        for at, text in enumerate(texts):
            if options.slow_row is None or text is None or options.slow_row not in text:
                continue
            seconds = options.slow_row_ms / 1000
            if timeout is not None and seconds > timeout:
                late.append(at)
                seconds = timeout
            if cancel.wait(seconds):
                break
        return late

    def on_texts(self, texts: Sequence[str | None]) -> None:
        """Raise :class:`TransientError` or :class:`EngineDead`, or end the process, if one of these rows says so."""
        options = self._options
        if self._strikes("transient", options.transient_on, texts, options.transient_times):
            raise TransientError(f"scripted: a row contains {options.transient_on!r}")
        if self._strikes("crash_on", options.crash_on, texts, options.crash_times):
            os._exit(KILLED)
        if self._strikes("die", options.die_on, texts, options.die_times):
            raise EngineDead(f"scripted: a row that contains {options.die_on!r} killed the engine")

    def computed(self, n: int) -> None:
        """``n`` more rows were computed; nobody has them yet."""
        if self._options.rows_file is not None:
            with Path(self._options.rows_file).open("ab") as file:
                file.write(b"." * n)

    def after_rows(self, n: int) -> None:
        """``n`` more rows were handed over: signal or crash if the script says so."""
        options = self._options
        with self._counts.lock:
            before, self._counts.rows = self._counts.rows, self._counts.rows + n
        if options.touch_after_rows is not None and before < options.touch_after_rows[0] <= before + n:
            Path(options.touch_after_rows[1]).touch()
        if (
            options.crash_after_rows is not None
            and before < options.crash_after_rows <= before + n
            and self._counted("crash", options.crash_times)
        ):
            os._exit(KILLED)

    def _strikes(self, kind: str, needle: str | None, texts: Sequence[str | None], times: int | None) -> bool:
        if needle is None or not any(text is not None and needle in text for text in texts):
            return False
        return self._counted(kind, times)

    def _counted(self, kind: str, times: int | None) -> bool:
        """Count one strike; false when there have been enough."""
        if self._options.counts_dir is None:
            with self._counts.lock:
                number = self._counts.strikes[kind] = self._counts.strikes.get(kind, 0) + 1
        else:
            # One byte a strike, appended, and the number is the size: no lock is needed between processes.
            descriptor = os.open(Path(self._options.counts_dir) / kind, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, b".")
                number = os.lseek(descriptor, 0, os.SEEK_CUR)
            finally:
                os.close(descriptor)
        return times is None or number <= times
