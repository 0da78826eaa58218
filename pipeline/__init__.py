"""Rowmill: rows of Parquet in, a model over every row, rows of Parquet out.

The public names load on first use, so that importing a pure module loads neither SQLAlchemy nor an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.client import Client as Client
    from pipeline.job_handle import JobHandle as JobHandle
    from pipeline.job_spec import JobSpec as JobSpec
    from pipeline.schedule_spec import ScheduleSpec as ScheduleSpec
    from storage.errors import JobCancelled as JobCancelled
    from storage.errors import JobFailed as JobFailed
    from storage.errors import RowmillError as RowmillError

_HOMES = {
    "Client": "pipeline.client",
    "JobCancelled": "storage.errors",
    "JobFailed": "storage.errors",
    "JobHandle": "pipeline.job_handle",
    "JobSpec": "pipeline.job_spec",
    "ScheduleSpec": "pipeline.schedule_spec",
    "RowmillError": "storage.errors",
}

__all__ = ["Client", "JobCancelled", "JobFailed", "JobHandle", "JobSpec", "RowmillError", "ScheduleSpec"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
