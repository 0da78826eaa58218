"""Rowmill: rows of Parquet in, a model over every row, rows of Parquet out.

The public names load on first use, so that importing a pure module loads neither SQLAlchemy nor an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.client.client import Client as Client
    from pipeline.client.handle import JobHandle as JobHandle
    from pipeline.schedules.spec import ScheduleSpec as ScheduleSpec
    from pipeline.spec.job_spec import JobSpec as JobSpec
    from storage.errors import JobCancelled as JobCancelled
    from storage.errors import JobFailed as JobFailed
    from storage.errors import RowmillError as RowmillError

_HOMES = {
    "Client": "pipeline.client.client",
    "JobCancelled": "storage.errors",
    "JobFailed": "storage.errors",
    "JobHandle": "pipeline.client.handle",
    "JobSpec": "pipeline.spec.job_spec",
    "ScheduleSpec": "pipeline.schedules.spec",
    "RowmillError": "storage.errors",
}

__all__ = ["Client", "JobCancelled", "JobFailed", "JobHandle", "JobSpec", "RowmillError", "ScheduleSpec"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
