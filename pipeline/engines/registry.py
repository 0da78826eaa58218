"""Engine names and the classes behind them, imported on demand; third parties plug in through entry points."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from pipeline.engines.base import Engine
from pipeline.job_spec import Task
from pipeline.models.model import Model
from storage.errors import EngineMissing, InvalidJob

GROUP = "rowmill.engines"
"""Entry-point group: ``name = "module:Class"``, a class that follows :class:`pipeline.engines.base.Engine`."""

BUILT_IN: Mapping[str, str] = {
    "fake": "pipeline.engines.fake:FakeEngine",
    "vllm": "pipeline.engines.vllm:VllmEngine",
    "onnx": "pipeline.engines.onnx:OnnxEngine",
}
_PROTOCOL = ("check", "load", "result_schema", "infer", "stats", "close")


def names() -> tuple[str, ...]:
    """Every engine that can be asked for, the built-in ones first. Imports none."""
    plugged = {point.name for point in importlib.metadata.entry_points(group=GROUP)}
    return (*BUILT_IN, *sorted(plugged - set(BUILT_IN)))


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
    except (ImportError, AttributeError) as error:
        raise EngineMissing(f"engine {name!r} ({where}) cannot be imported: {error}", field="engine") from error
    lacking = [part for part in _PROTOCOL if not callable(getattr(found, part, None))]
    if not isinstance(found, type) or lacking:
        raise EngineMissing(f"{where} is no engine: it lacks {', '.join(lacking) or 'a class'}", field="engine")
    return found


def engine_key(name: str, model: Model, task: Task, options: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what makes two loaded engines interchangeable: name, model content, task and options.

    Raises :class:`InvalidJob` when the options hold what JSON cannot.
    """
    try:
        text = json.dumps([name, model.digest, task, options], sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InvalidJob(f"they cannot be written as JSON: {error}", field="engine_options") from error
    return hashlib.sha256(text.encode()).hexdigest()
