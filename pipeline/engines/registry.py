"""Engine names and the classes behind them, imported on demand; third parties plug in through entry points."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa

from pipeline.engines.base import (
    CachesAnswers,
    CarriesState,
    ChecksRequests,
    Engine,
    GivesNotices,
    NamesResults,
    NeedsOfHost,
    NeedsPackage,
    Permissions,
    RestrictsOptions,
    SettlesOptions,
    SharesInstances,
    SuggestsSlots,
    TimesOutRequests,
)
from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec, Task
from pipeline.spec.result_columns import names_of
from storage.errors import EngineMissing, InvalidJob

GROUP = "rowmill.engines"
"""Entry-point group: ``name = "module:Class"``, a class that follows :class:`pipeline.engines.base.Engine`."""

BUILT_IN: Mapping[str, str] = {
    "fake": "pipeline.engines.fake.engine:FakeEngine",
    "vllm": "pipeline.engines.vllm.engine:VllmEngine",
    "onnx": "pipeline.engines.onnx.engine:OnnxEngine",
}
_PROTOCOL = ("check", "load", "result_schema", "infer", "stats", "close")


def names() -> tuple[str, ...]:
    """Every engine that can be asked for, the built-in ones first. Imports none."""
    plugged = {point.name for point in importlib.metadata.entry_points(group=GROUP)}
    return (*BUILT_IN, *sorted(plugged - set(BUILT_IN)))


def installed() -> tuple[str, ...]:
    """The engines that a worker on this machine can serve, as far as that shows without loading one; no ``fake``."""
    return tuple(name for name in names() if name != "fake" and not lacks(name))


def lacks(name: str) -> str | None:
    """What to install before a worker can serve this engine; ``None`` when nothing. Imports the engine's module, and
    not the package that it needs."""
    module, remedy = _package(name)
    return remedy if module is not None and not _is_there(module) else None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def _package(name: str) -> tuple[str | None, str | None]:
    with suppress(EngineMissing):
        kind = engine_class(name)
        if issubclass(kind, NeedsPackage):
            return kind.package()
    return None, None


def default_slots(name: str, otherwise: int) -> int:
    """How many shards a process runs at a time where no setting says so; ``otherwise`` where the engine has no view."""
    with suppress(EngineMissing, InvalidJob):  # each attempt says so, and its shard with it
        kind = engine_class(name)
        if issubclass(kind, SuggestsSlots):
            return kind.default_slots()
    return otherwise


def names_with(protocol: type) -> tuple[str, ...]:
    """The engines whose classes follow an optional protocol. Those that cannot be imported here are left out."""
    found = []
    for name in names():
        with suppress(EngineMissing):
            if issubclass(engine_class(name), protocol):
                found.append(name)
    return tuple(found)


def engine_class(name: str) -> type[Engine]:
    """The class of that name; its module is imported now. A plug-in cannot take a built-in name.

    Raises :class:`InvalidJob` for an unknown name and :class:`EngineMissing` for one that cannot be imported.
    """
    if name in BUILT_IN:
        where = BUILT_IN[name]
    else:
        points = importlib.metadata.entry_points(group=GROUP, name=name)
        if not points:
            raise InvalidJob(f"there is no engine {name!r}; there are auto, {', '.join(names())}", field="engine")
        where = next(iter(points)).value
    module, _, attribute = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a plug-in's module may raise anything, and the others go on without it
        plain = isinstance(error, (ImportError, AttributeError))
        why = str(error) if plain else f"{type(error).__name__}: {error}"
        raise EngineMissing(f"engine {name!r} ({where}) cannot be imported: {why}", field="engine") from error
    lacking = [part for part in _PROTOCOL if not callable(getattr(found, part, None))]
    if not isinstance(found, type) or lacking:
        raise EngineMissing(f"{where} is no engine: it lacks {', '.join(lacking) or 'a class'}", field="engine")
    return found


def check_permissions(name: str, options: Mapping[str, Any], permissions: Permissions) -> None:
    """Refuse options that the engine says need the operator's leave, and have not got it.

    Raises :class:`~storage.errors.InvalidJob`.
    """
    kind = engine_class(name)
    if issubclass(kind, RestrictsOptions):
        kind.check_permissions(options, permissions)


def check_host(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an engine, or options, that this machine cannot run. Raises :class:`EngineMissing`."""
    if (remedy := lacks(name)) is not None:
        raise EngineMissing(f"engine {name!r} is not installed here; install {remedy}", field="engine")
    kind = engine_class(name)
    if issubclass(kind, NeedsOfHost) and (needs := kind.host_needs(options)):
        _refuse_missing(name, needs, [kind.host_offers()], "this machine")


def check_workers(name: str, options: Mapping[str, Any], offers: Collection[Collection[str]]) -> None:
    """Refuse options that none of the workers can run. ``offers``: of each of them, as :func:`host_offers` has it.

    Raises :class:`EngineMissing`; never without a worker.
    """
    kind = engine_class(name)
    if offers and issubclass(kind, NeedsOfHost):
        _refuse_missing(name, kind.host_needs(options), offers, f"no worker that serves engine {name!r}")


def host_offers(names: Iterable[str]) -> dict[str, list[str]]:
    """What this machine has, by engine; nothing of engines that ask for nothing, or cannot be imported here."""
    found = {}
    for name in names:
        with suppress(EngineMissing, InvalidJob):
            kind = engine_class(name)
            if issubclass(kind, NeedsOfHost):
                found[name] = sorted(kind.host_offers())
    return found


def _refuse_missing(name: str, needs: Mapping[str, str], offers: Collection[Collection[str]], who: str) -> None:
    if any(needs.keys() <= set(there) for there in offers):
        return
    missing = [need for need in needs if not all(need in there for there in offers)]
    known = ", ".join(sorted(set().union(*offers))) or "none"
    verb = "lacks" if who == "this machine" else "has"
    _, remedy = _package(name)
    more = f"; install {remedy}" if remedy else ""
    raise EngineMissing(f"{who} {verb} {', '.join(missing)}; there are {known}{more}", field=needs[missing[0]])


def check_request(name: str, spec: JobSpec, model: Model) -> None:
    """Refuse what cannot work whatever the input holds, as far as the engine says. Raises :class:`InvalidJob`."""
    kind = engine_class(name)
    task = spec.task
    if spec.cache != "off" and not (issubclass(kind, CachesAnswers) and task in kind.cached_tasks()):
        raise InvalidJob(f"engine {name!r} caches no answers of task '{task}'; leave it off", field="cache")
    if spec.sequence is not None and not (issubclass(kind, CarriesState) and task in kind.stateful_tasks()):
        raise InvalidJob(
            f"engine {name!r} carries no state from row to row of task '{task}'; leave it out", field="sequence"
        )
    if spec.request_timeout is not None and not (issubclass(kind, TimesOutRequests) and task in kind.timed_tasks()):
        raise InvalidJob(
            f"engine {name!r} aborts no single rows of task '{task}'; leave it out", field="request_timeout"
        )
    if issubclass(kind, ChecksRequests) and _goes_with(kind, "check_request", "check"):
        kind.check_request(spec, model)


def notices(name: str, spec: JobSpec, model: Model) -> Iterable[str]:
    """What the engine has to say about a request that passed :func:`check_request`."""
    kind = engine_class(name)
    return kind.notices(spec, model) if issubclass(kind, GivesNotices) else ()


def check(name: str, spec: JobSpec, model: Model, schema: pa.Schema) -> tuple[str, ...]:
    """The input columns that the job reads: see :meth:`Engine.check`, which comes after :func:`check_request`."""
    return engine_class(name).check(spec, model, schema)


def settled(name: str, spec: JobSpec, model: Model, schema: pa.Schema) -> JobSpec:
    """The spec with the engine's options as the input's columns decide them, where the job leaves them open."""
    kind = engine_class(name)
    if issubclass(kind, SettlesOptions) and _goes_with(kind, "settle", "check"):
        return spec.model_copy(update={"engine_options": dict(kind.settle(spec, model, schema))})
    return spec


def result_names(name: str, spec: JobSpec, model: Model) -> tuple[str, ...] | None:
    """The result columns of a job that :func:`check` has passed, without prefix; ``None``: only loading tells them."""
    kind = engine_class(name)
    own = None
    if issubclass(kind, NamesResults) and _goes_with(kind, "result_names", "result_schema"):
        own = kind.result_names(spec, model)
    return names_of(spec) if own is None else own


def _goes_with(kind: type, part: str, whole: str) -> bool:
    """Whether ``part`` speaks for ``whole``: a subclass that replaces ``whole`` alone has other rules."""

    def depth(name: str) -> int:
        return next(at for at, base in enumerate(kind.__mro__) if name in vars(base))

    return depth(part) <= depth(whole)


def engine_key(name: str, model: Model, task: Task, options: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what makes two loaded engines interchangeable: name, model content, tasks and options.

    The tasks are those that share an instance with this one, by the engine's own word: see :func:`shared_tasks`.
    Raises :class:`InvalidJob` when the options hold what JSON cannot.
    """
    parts = [name, model.digest, sorted(shared_tasks(name, task)), options]
    try:
        text = json.dumps(parts, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InvalidJob(f"they cannot be written as JSON: {error}", field="engine_options") from error
    return hashlib.sha256(text.encode()).hexdigest()


def shared_tasks(name: str, task: Task) -> frozenset[Task]:
    """The tasks that one loaded instance does, whichever of them it was made for; ``task`` is always among them.

    An engine class may name them (:class:`SharesInstances`); without it, each task has an instance of its own.
    """
    kind = engine_class(name)
    shared = kind.shared_tasks() if issubclass(kind, SharesInstances) else frozenset()
    return shared if task in shared else frozenset({task})
