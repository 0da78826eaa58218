"""Which engine runs a task on a model: the one that was asked for, or the first that says that the model fits it."""

from __future__ import annotations

from contextlib import suppress

from pipeline.engines import registry
from pipeline.engines.base import FitsModels, NamesTasks
from pipeline.models.model import Model
from pipeline.models.tasks import NEEDS, kind_of, listed, tasks_of
from pipeline.spec.job_spec import Task
from storage.errors import EngineMissing, InvalidJob, InvalidModel

AUTO = "auto"


def choose(task: Task, engine_asked: str, model: Model) -> str:
    """The engine's name: the one that was asked for, or for ``auto`` the first that fits task and model.

    Raises :class:`InvalidModel` when the model cannot do the task, naming its kind and what it can do, and
    :class:`InvalidJob` when the engine that was asked for cannot, or is not known.
    """
    if model.path is None:
        return _engine_of_built_in(task, engine_asked, model)
    if engine_asked == AUTO:
        found = _first_fitting(task, model)
        if found is None:
            raise _unfit(task, model, tasks_of(model), _able(task, model))
        return found
    kind = registry.engine_class(engine_asked)
    if task not in kind.tasks:
        raise InvalidJob(
            f"engine '{engine_asked}' does {listed(kind.tasks)}, not {task}; leave the engine to 'auto'", field="engine"
        )
    if issubclass(kind, NamesTasks) and task not in (can := kind.tasks_with(model)):
        raise _unfit(task, model, can)
    return engine_asked


def _engine_of_built_in(task: Task, engine_asked: str, model: Model) -> str:
    """A model without files runs on the engine that it is built into, and nowhere else."""
    found = _first_fitting(task, model)
    assert found is not None
    if engine_asked not in (AUTO, found):
        raise InvalidJob(f"model '{model.name}' runs on engine '{found}' only, not on {engine_asked!r}", field="engine")
    return found


def _first_fitting(task: Task, model: Model) -> str | None:
    """The built-in engines are asked first. One whose module cannot be imported here is passed over."""
    for name in registry.names():
        with suppress(EngineMissing):
            kind = registry.engine_class(name)
            if issubclass(kind, FitsModels) and kind.fits(task, model):
                return name
    return None


def _able(task: Task, model: Model) -> str | None:
    """The first engine that runs the task on the model when it is asked for by name."""
    for name in registry.names_with(NamesTasks):
        kind = registry.engine_class(name)
        if issubclass(kind, NamesTasks) and task in kind.tasks & kind.tasks_with(model):
            return name
    return None


def _unfit(task: Task, model: Model, can: frozenset[Task], able: str | None = None) -> InvalidModel:
    what = f"it can {listed(can)}" if can else "none of the tasks fits it"
    if able is not None:
        what += f"; engine '{able}' does {task} with it if you name it"
    return InvalidModel(f"task '{task}' needs {NEEDS[task]}; {model.name} is {kind_of(model)}: {what}", field="model")
