"""Small optional protocols of engines: what they do beyond every engine's part, asked of the class or of an instance.

They are promised from :mod:`pipeline.engines.base`, where the others are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from pipeline.models.model import Model
from pipeline.spec.check import Check
from pipeline.spec.job_spec import Task


@runtime_checkable
class FitsModels(Protocol):
    """An engine class that ``engine="auto"`` may choose."""

    @classmethod
    def fits(cls, task: Task, model: Model) -> bool:
        """Whether this engine is the one to run ``task`` on ``model``, by what is in the model's directory.

        The engines of Rowmill are asked first, then those of other distributions by name; the first that fits is
        chosen. Loads nothing.
        """
        ...


@runtime_checkable
class NamesTasks(Protocol):
    """An engine class that knows, before it is loaded, which of its tasks a model can do."""

    @classmethod
    def tasks_with(cls, model: Model) -> frozenset[Task]:
        """The tasks that it runs on ``model`` when it is asked for by name. Others are refused at submit."""
        ...


@runtime_checkable
class SuggestsSlots(Protocol):
    """An engine class that is faster with several shards of a process at a time."""

    @classmethod
    def default_slots(cls) -> int:
        """How many shards a process runs at a time where no setting says so; 1 or more."""
        ...


@runtime_checkable
class NeedsPackage(Protocol):
    """An engine class that cannot be loaded without a package that its own distribution does not bring."""

    @classmethod
    def package(cls) -> tuple[str, str]:
        """The module that has to be importable, and what to install for it: (``"vllm"``, ``"rowmill[vllm]"``)."""
        ...


@runtime_checkable
class Diagnoses(Protocol):
    """An engine class that tells ``rowmill doctor`` whether it works on this machine."""

    @classmethod
    def diagnose(cls, *, deep: bool) -> Iterable[Check]:
        """Its findings, named ``engine NAME`` or ``engine NAME, PART``. They may take seconds, and minutes if ``deep``.

        What may crash or hang is tried in a process of its own.
        """
        ...


@runtime_checkable
class SharesInstances(Protocol):
    """An engine class whose instances do several tasks, whichever of them they were made for."""

    @classmethod
    def shared_tasks(cls) -> frozenset[Task]:
        """The tasks that share one loaded instance. Each other task has an instance of its own."""
        ...


@runtime_checkable
class CachesAnswers(Protocol):
    """An engine class that keeps answers across jobs in the context's ``results``, where ``JobSpec.cache`` asks."""

    @classmethod
    def cached_tasks(cls) -> frozenset[Task]:
        """The tasks whose answers it keeps. A job of another task that asks for it is refused."""
        ...


@runtime_checkable
class TimesOutRequests(Protocol):
    """An engine class that can abort single rows."""

    @classmethod
    def timed_tasks(cls) -> frozenset[Task]:
        """The tasks whose rows it aborts after ``JobSpec.request_timeout``. Others that ask for it are refused."""
        ...


@runtime_checkable
class CarriesState(Protocol):
    """An engine class that carries state from row to row of a sequence (``JobSpec.sequence``)."""

    @classmethod
    def stateful_tasks(cls) -> frozenset[Task]:
        """The tasks in which it does. A job of another task that asks for it is refused."""
        ...


@runtime_checkable
class MeasuresMemory(Protocol):
    """An engine that has processes of its own."""

    def memory_bytes(self) -> int | None:
        """Resident memory of these processes now, in bytes; ``None``: not known. What the host's process grew by while
        the engine loaded is measured by the host."""
        ...


@runtime_checkable
class Restarts(Protocol):
    """An engine that may have to be made anew while it works."""

    def needs_restart(self) -> bool:
        """Asked after each lease. When true, the engine is closed once nobody uses it, and made anew for the next."""
        ...
