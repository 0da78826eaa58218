"""The engines that this process keeps loaded, shared between shards and jobs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from pipeline.engines import registry
from pipeline.engines.base import Cancellation, Engine, EngineContext, MeasuresMemory, Restarts
from pipeline.models.model import Model
from pipeline.models.resolve import resolve
from pipeline.spec.job_spec import Task
from storage.errors import InvalidModel
from storage.log_actions import Action
from storage.logs import get_logger, thread_with_ids

log = get_logger(__name__)

_LOOK_SECONDS = 0.1
"""How often a lease that waits looks whether it was cancelled."""

LOAD_AMORTISATION = 10.0
"""The load of an engine is amortised once it worked this many times as long: at most a tenth of the time is loading."""


class LeaseCancelled(Exception):
    """Whoever asked for the engine does not want it any more. It may still be loading."""


@dataclass(eq=False, slots=True)
class _Entry:
    """One engine. ``users`` counts its leases; ``used`` orders entries by their last one.

    ``grown``: bytes by which this process grew while it was loaded; ``expected``: its weights, until it is loaded.
    ``amortised_at``: when its load is amortised, by the monotonic clock.
    """

    key: str
    engine: Engine
    model: Model
    expected: int = 0
    grown: int = 0
    amortised_at: float = float("inf")
    users: int = 0
    used: int = 0
    closing: bool = False
    loaded: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None

    @property
    def bytes(self) -> int:
        """What it takes of the host's memory: as the engine tells, else as measured, else as the files say."""
        if not self.loaded.is_set():
            return self.expected
        told = self.engine.memory_bytes() if isinstance(self.engine, MeasuresMemory) else None
        return self.grown + int(told or 0)


class EnginePool:
    """Loads each engine once, keeps it warm, and closes the one that was used longest ago when there are too many.

    At most ``max_engines`` stay loaded, because each of them may take most of a device's memory, and at most
    ``memory_bytes`` of the host's resident memory are theirs: the growth of this process while an engine loads, and
    what the engine says of its own processes (:class:`MeasuresMemory`). A GPU's memory is
    not measured. An engine in use is never closed: when all are, the pool grows past its limits and shrinks again as
    leases end; nor is the last one, however large.
    """

    def __init__(
        self,
        context: EngineContext,
        max_engines: int = 1,
        memory_bytes: int | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_engines < 1:
            raise ValueError(f"max_engines must be at least 1, not {max_engines}")
        self._context = context
        self._max = max_engines
        self._max_bytes = memory_bytes
        self._now = now
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._dying: set[_Entry] = set()
        self._clock = 0
        self._closed = False

    @contextmanager
    def lease(
        self,
        name: str,
        model: Model,
        task: Task,
        options: Mapping[str, Any],
        cancel: Cancellation | None = None,
    ) -> Iterator[Engine]:
        """A loaded engine, kept until the block ends. Two threads that ask at once share one load.

        The engine may have been made for another task: one that it says shares its instances.

        Raises :class:`~storage.errors.InvalidModel` for a model whose files changed since its digest was taken,
        whatever the engine's ``load`` raises (in every thread that waited for it; the next lease tries again),
        :class:`~storage.errors.InvalidJob` for an unknown engine, and :class:`LeaseCancelled` when ``cancel`` fires
        before the engine is ready: loading goes on then, for whoever comes next, until the pool is closed.
        """
        key = registry.engine_key(name, model, task, options)
        entry = self._enter(key, name, model, task, options, cancel)
        try:
            yield entry.engine
        finally:
            self._leave(entry)

    def discard(self, engine: Engine) -> None:
        """Never lease this engine again: it is dead. It is closed when its last lease ends, and rebuilt on demand."""
        with self._lock:
            for entry in self._entries.values():
                if entry.engine is engine:
                    self._condemn(entry)
                    break
            doomed = self._unused()
        self._end(doomed)

    def loaded(self) -> tuple[Engine, ...]:
        """The engines that are loaded now, the one used longest ago first."""
        with self._lock:
            ready = [entry for entry in self._entries.values() if entry.loaded.is_set()]
            return tuple(entry.engine for entry in sorted(ready, key=lambda entry: entry.used))

    def warm_keys(self) -> tuple[str, ...]:
        """The keys (``registry.engine_key``) of the engines that are loaded here, or are being loaded."""
        with self._lock:
            return tuple(self._entries)

    def sticky_keys(self) -> tuple[str, ...]:
        """The :meth:`warm_keys` whose load is not amortised yet (``LOAD_AMORTISATION``): they should get work first."""
        with self._lock:
            return tuple(key for key, entry in self._entries.items() if entry.amortised_at > self._now())

    def warm(self) -> list[dict[str, Any]]:
        """What is loaded now, for people and for whoever chooses shards: ``key``, ``engine``, ``model``, ``bytes``."""
        with self._lock:
            ready = [entry for entry in self._entries.values() if entry.loaded.is_set()]
        return [{"key": e.key, "engine": e.engine.name, "model": e.model.name, "bytes": e.bytes} for e in ready]

    def close(self) -> None:
        """Close every engine, in use or not: the process is about to end. No lease is given afterwards.

        An engine that is still loading in another thread is closed there.
        """
        with self._lock:
            self._closed = True
            for entry in list(self._entries.values()):
                self._condemn(entry)
            doomed = self._taken([entry for entry in self._dying if entry.loaded.is_set()])
        self._end(doomed)

    def _enter(
        self,
        key: str,
        name: str,
        model: Model,
        task: Task,
        options: Mapping[str, Any],
        cancel: Cancellation | None,
    ) -> _Entry:
        while True:
            with self._lock:
                if self._closed:
                    raise RuntimeError("the engine pool is closed")
                # A dead engine may still hold the memory that its successor needs.
                predecessor = next((entry for entry in self._dying if entry.key == key), None)
                if predecessor is None:
                    entry = self._entries.get(key)
                    first = entry is None
                    if entry is None:
                        # Again, because this may be another host than the one that took the job.
                        registry.check_permissions(name, options, self._context.permissions)
                        engine = registry.engine_class(name)(model, task, options, self._context)
                        entry = self._entries[key] = _Entry(key, engine, model, _size(model))
                    entry.users += 2 if first else 1  # the thread that loads it is a user as well
                    self._clock += 1
                    entry.used = self._clock
                    doomed = self._surplus() if first else []
                    break
            _wait(predecessor.gone, cancel)
        if first:
            # Not in this thread: it must be free to hand its shard back when the process has to end.
            thread_with_ids("rowmill-load", self._load, entry, doomed).start()
        try:
            _wait(entry.loaded, cancel)
        except LeaseCancelled:
            self._leave(entry)
            raise
        if entry.failure is not None or self._closed:
            self._leave(entry)
            raise entry.failure or RuntimeError("the engine pool is closed")
        return entry

    def _load(self, entry: _Entry, doomed: list[_Entry]) -> None:
        self._end(doomed)
        before, began = _resident(), self._now()
        try:
            entry.engine.load()
            self._check_unchanged(entry.model)
            entry.amortised_at = self._now() + LOAD_AMORTISATION * (self._now() - began)
            entry.grown = max(0, _resident() - before)
        except BaseException as error:  # raised by every lease that waits for this load
            entry.failure = error
            with self._lock:
                self._condemn(entry)
        finally:
            entry.loaded.set()
        self._leave(entry)  # where room is made, too: it may be larger than its files promised

    def _check_unchanged(self, model: Model) -> None:
        """What was loaded is what the digest was taken of: jobs, manifests and cached results rest on it."""
        if model.path is not None and resolve(model.name, self._context.cache_dir).digest != model.digest:
            raise InvalidModel(f"{model.name} changed while it was loaded; submit a new job", field="model")

    def _leave(self, entry: _Entry) -> None:
        restart = isinstance(entry.engine, Restarts) and entry.engine.needs_restart()
        with self._lock:
            entry.users -= 1
            if restart and self._entries.get(entry.key) is entry:
                log.warning(
                    "engine %s is started again: its memory has grown too much",
                    entry.engine.name,
                    action=Action.ENGINE_RESTARTED,
                )
                self._condemn(entry)
            doomed = self._surplus()
        self._end(doomed)

    def _condemn(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        self._dying.add(entry)

    def _surplus(self) -> list[_Entry]:
        """Take out the idle entries above the limits, the one used longest ago first."""
        idle = sorted((e for e in self._entries.values() if e.users == 0), key=lambda entry: entry.used)
        for entry in idle:
            if len(self._entries) > self._max or (len(self._entries) > 1 and self._over_budget()):
                self._condemn(entry)
        return self._unused()

    def _over_budget(self) -> bool:
        return self._max_bytes is not None and sum(e.bytes for e in self._entries.values()) > self._max_bytes

    def _unused(self) -> list[_Entry]:
        return self._taken([entry for entry in self._dying if entry.users == 0])

    def _taken(self, entries: list[_Entry]) -> list[_Entry]:
        """Mark as closing, and return, the entries that no other thread closes already. The caller closes them."""
        fresh = [entry for entry in entries if not entry.closing]
        for entry in fresh:
            entry.closing = True
        return fresh

    def _end(self, entries: list[_Entry]) -> None:
        for entry in entries:
            try:
                entry.engine.close()
            except (Exception, SystemExit):
                # It is given up anyway; what it could not free goes with the process.
                log.exception("engine %s did not close cleanly", entry.engine.name, action=Action.ENGINE_CLOSE_FAILED)
            with self._lock:
                self._dying.discard(entry)
            entry.gone.set()


def _wait(event: threading.Event, cancel: Cancellation | None) -> None:
    """Until the event is set, or :class:`LeaseCancelled`."""
    while not event.wait(None if cancel is None else _LOOK_SECONDS):
        if cancel is not None and cancel.cancelled:
            raise LeaseCancelled(cancel.reason)


def _resident() -> int:
    """Resident memory of this process, in bytes."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def _size(model: Model) -> int:
    """What the model takes at least, before it was ever loaded: the bytes of its weights, or of its best graph."""
    files = model.weights or model.onnx_files[:1]
    if not files and model.path is not None and model.path.is_dir():
        files = tuple(model.path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files if file.exists())
