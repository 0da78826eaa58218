"""The one protocol that every engine speaks, the values that cross it, and all else that an engine's author imports.

Rows travel in column batches, so that tensors and embeddings never become Python objects. Each batch carries the row
indices its rows have within the shard; results come back in any order, keyed by these indices.

The names in ``__all__`` are promised to stay importable from here, wherever they are defined. Engines of other
distributions import nothing else of Rowmill; ``pipeline.engines.testing`` is for their tests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.engines.optional_parts import (
    CachesAnswers,
    CarriesState,
    Diagnoses,
    FitsModels,
    MeasuresMemory,
    NamesTasks,
    NeedsPackage,
    Restarts,
    SharesInstances,
    SuggestsSlots,
    TimesOutRequests,
)
from pipeline.models.model import Model
from pipeline.spec.check import Check
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec, Task
from pipeline.spec.prompt_template import Template
from pipeline.spec.result_columns import fields_of
from storage.errors import (
    Blame,
    EngineDead,
    EngineMissing,
    InvalidInput,
    InvalidJob,
    InvalidModel,
    RowError,
    TransientError,
)
from storage.redaction import redact_known
from storage.storable import storable

if TYPE_CHECKING:
    from pipeline.result_cache.cache import ResultCaches

__all__ = [
    "Blame",
    "CachesAnswers",
    "Cancellation",
    "CarriesState",
    "Check",
    "ChecksRequests",
    "Diagnoses",
    "Engine",
    "EngineContext",
    "EngineDead",
    "EngineMissing",
    "FeedsGraphs",
    "FitsModels",
    "GivesNotices",
    "InvalidInput",
    "InvalidJob",
    "InvalidModel",
    "JobSpec",
    "MeasuresMemory",
    "Model",
    "NamesResults",
    "NamesTasks",
    "NeedsOfHost",
    "NeedsPackage",
    "Permissions",
    "ReadsMany",
    "Restarts",
    "RestrictsOptions",
    "ResultBatch",
    "RowBatch",
    "RowError",
    "RowErrorCode",
    "RowFailure",
    "RowIds",
    "SettlesOptions",
    "SharesInstances",
    "SuggestsSlots",
    "Task",
    "Template",
    "TimesOutRequests",
    "TransientError",
    "fields_of",
]

RowIds = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowBatch:
    """``rows``: int64 [n], indices within the shard; ``columns``: n rows of the columns that ``check`` asked for."""

    rows: RowIds
    columns: pa.RecordBatch


@dataclass(frozen=True, slots=True)
class RowFailure:
    """One row that cannot be computed. ``code`` is a ``RowErrorCode``; ``message`` is made storable, and the
    secrets of the settings are hidden in it."""

    row: int
    code: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", storable(redact_known(self.message)))


@dataclass(frozen=True, slots=True)
class ResultBatch:
    """``rows``: int64 [n]; ``values``: n rows of the engine's ``result_schema``; ``failures``: rows that failed.

    ``measured``: numbers that add up, over the batches of a call and over calls: what this one took since its last
    batch (``render_seconds``, ``copied_rows``, …). They become part of the attempt's statistics, and of the job's.
    """

    rows: RowIds
    values: pa.RecordBatch | None
    failures: tuple[RowFailure, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)


class Cancellation:
    """Set once, from any thread, to stop one ``infer`` call.

    An engine that blocks registers a callback (abort the requests, terminate the run); it is called at once if the
    cancellation came first. ``reason`` is for people: ``"job cancelled"``, ``"lease lost"``, ``"interrupted"``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._next = 0
        self.reason: str | None = None

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def cancel(self, reason: str) -> None:
        """Ask for the stop. The first reason stands; later calls do nothing."""
        with self._lock:
            if self._event.is_set():
                return
            self.reason = reason
            self._event.set()
            callbacks = list(self._callbacks.values())
        for callback in callbacks:
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` once when cancelled. Returns a function that takes the registration back."""
        with self._lock:
            if not self._event.is_set():
                key = self._next = self._next + 1
                self._callbacks[key] = callback

                def forget() -> None:
                    with self._lock:
                        self._callbacks.pop(key, None)

                return forget
        callback()
        return lambda: None

    def wait(self, timeout: float) -> bool:
        """Sleep until cancelled or ``timeout`` seconds have passed; true when cancelled."""
        return self._event.wait(timeout)


@dataclass(frozen=True, slots=True)
class Permissions:
    """What the operator's settings allow jobs beyond reading their own input and model.

    ``engine_options``: names in the setting ``allowed_engine_options``. ``custom_op_paths``: libraries of custom
    operators. ``own_machine``: there is no fleet, so a job may name any directory of the machine of whoever runs it.
    """

    engine_options: frozenset[str] = frozenset()
    custom_op_paths: tuple[Path, ...] = ()
    own_machine: bool = False

    def require(self, name: str, why: str, *, field: str) -> None:
        """Raise :class:`~storage.errors.InvalidJob` unless ``allowed_engine_options`` names ``name``; ``why``: what
        an option of this name can do that needs the operator's leave."""
        if name not in self.engine_options:
            raise InvalidJob(
                f"only the operator may allow it, since {why}: the setting allowed_engine_options must name {name!r}",
                field=field,
            )


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What an engine gets from its host: where to cache exported and compiled models, how to tell the user, how to read
    a file that a row names (raises :class:`~storage.errors.InvalidInput` for one that the operator does not allow),
    how many rows, in how many bytes of memory, it may gather to put them in order, what the operator permits, and where
    answers are kept across jobs (``None``: nowhere)."""

    cache_dir: Path
    notify: Callable[[str], None] = field(default=lambda message: None)
    fetch: Callable[[str], bytes] | None = None
    order_rows: int = 16_384
    order_bytes: int = 256 * 2**20
    permissions: Permissions = Permissions()
    results: ResultCaches | None = None


class Engine(Protocol):
    """A model loaded and ready, shared by every shard and job with the same ``engine_key``.

    Life: ``check`` (no instance, nothing loaded) → ``__init__`` (cheap) → ``load`` → any number of ``infer`` calls,
    from several threads at once → ``close``. Errors by type: :class:`~storage.errors.EngineDead` when it must be
    rebuilt, :class:`~storage.errors.TransientError` when a retry may help, :class:`~storage.errors.InvalidJob` (from
    ``check`` and ``load``) when no retry can help.

    What an engine may do beyond this has small protocols of its own, found by ``isinstance`` and ``issubclass``.
    """

    name: ClassVar[str]
    tasks: ClassVar[frozenset[Task]]

    def __init__(self, model: Model, task: Task, options: Mapping[str, Any], context: EngineContext) -> None: ...

    @classmethod
    def check(cls, spec: JobSpec, model: Model, schema: pa.Schema) -> tuple[str, ...]:
        """Refuse what cannot work, before anything is loaded; return the input columns that the task reads.

        Raises :class:`~storage.errors.InvalidJob` with the field and the reason: unknown sampling key, missing
        column, wrong column type, wrong task for the model, unknown engine option.
        """
        ...

    def load(self) -> None:
        """Make ready to infer; may take minutes. Called once, before any other method."""
        ...

    def result_schema(self, spec: JobSpec) -> pa.Schema:
        """The result columns for this job, without prefix and without ``error``. Known once loaded."""
        ...

    def infer(self, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation) -> Iterator[ResultBatch]:
        """Exactly one result or failure for every row of ``batches``, as they come, in any order.

        ``batches`` is drawn lazily and from any thread (but one at a time), only so far ahead as the engine's window
        allows. After ``cancel`` the iterator ends soon, and what it has not yielded is simply not done; whatever runs
        inside the engine for this call is aborted. Closing the iterator early does the same.
        """
        ...

    def stats(self) -> dict[str, Any]:
        """JSON-able facts since ``load``: versions, real placement, token counters, cache hits."""
        ...

    def close(self) -> None:
        """Free memory and end processes. Safe to call twice, and after a failed ``load``."""
        ...


@runtime_checkable
class ReadsMany(Protocol):
    """An engine, loaded, whose rows are small: it may be handed more of them at a time than others."""

    @property
    def batch_rows(self) -> int | None:
        """Most rows in a batch, where the setting ``read_batch_rows`` is not set; ``None``: as for every engine."""
        ...


@runtime_checkable
class RestrictsOptions(Protocol):
    """An engine class with options that need the operator's leave: they run code, or reach beyond job and model."""

    @classmethod
    def check_permissions(cls, options: Mapping[str, Any], permissions: Permissions) -> None:
        """Refuse options that the operator has not allowed. Called at submit, and by a worker before it loads the
        engine. Raises :class:`~storage.errors.InvalidJob` (see :meth:`Permissions.require`)."""
        ...


@runtime_checkable
class ChecksRequests(Protocol):
    """An engine class that can judge a request before its input is known."""

    @classmethod
    def check_request(cls, spec: JobSpec, model: Model) -> None:
        """The part of :meth:`Engine.check` that does not depend on the input's columns: options, parameters, model.

        ``check`` covers it too. Raises :class:`~storage.errors.InvalidJob`.
        """
        ...


@runtime_checkable
class GivesNotices(Protocol):
    """An engine class that can tell what in a request works, and is probably a mistake."""

    @classmethod
    def notices(cls, spec: JobSpec, model: Model) -> Iterable[str]:
        """Sentences for the user, at submit. The request has passed ``check_request``. Loads nothing."""
        ...


@runtime_checkable
class SettlesOptions(Protocol):
    """An engine class with options that the input's columns decide where the job leaves them open."""

    @classmethod
    def settle(cls, spec: JobSpec, model: Model, schema: pa.Schema) -> Mapping[str, Any]:
        """The options that the engine is made with for this job, whose input has this ``schema``; ``check`` has passed
        it. The same for the same arguments, on every machine."""
        ...


@runtime_checkable
class NamesResults(Protocol):
    """An engine class whose result columns for some tasks are its own, and known before it is loaded."""

    @classmethod
    def result_names(cls, spec: JobSpec, model: Model) -> tuple[str, ...] | None:
        """The names in :meth:`Engine.result_schema`, for a request that :meth:`Engine.check` has passed; ``None``
        where only loading the model tells them."""
        ...


@runtime_checkable
class NeedsOfHost(Protocol):
    """An engine class whose options ask for something that one machine has and another lacks."""

    @classmethod
    def host_needs(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        """Names of what the options ask of the machine (execution providers), each with the field that asks."""
        ...

    @classmethod
    def host_offers(cls) -> frozenset[str]:
        """Names of what this machine has of that. May import the engine's library, and loads no model.

        Raises :class:`~storage.errors.EngineMissing` where the library is not there.
        """
        ...


@runtime_checkable
class FeedsGraphs(Protocol):
    """An engine that can tell what it feeds its model's graph: for calibration."""

    @classmethod
    def feeding_options(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options to make the engine with for that, from those of a job."""
        ...

    def feeds(self, spec: JobSpec, batches: Iterable[RowBatch]) -> Iterator[Mapping[str, Any]]:
        """Once loaded: what the graph is fed for these rows, batch by batch: graph input → array."""
        ...
