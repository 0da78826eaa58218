"""Files and batches as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from storage.sql.row_mapping import read
from storage.states import TERMINAL_BATCH, BatchState


class Purpose(StrEnum):
    """What a file is for."""

    BATCH = "batch"
    """The requests of a batch, uploaded."""
    BATCH_OUTPUT = "batch_output"
    """The lines that a batch wrote."""


@dataclass(frozen=True, slots=True)
class File:
    """A stored file. Times are Unix seconds; ``expires_at`` is ``None`` for one that stays until it is deleted."""

    id: str
    tenant: str
    purpose: Purpose
    filename: str
    uri: str
    n_bytes: int
    created_at: float
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file that a batch wrote, before it is recorded."""

    id: str
    filename: str
    uri: str
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """What a batch is created with. ``body_hash``: SHA-256 (hex) of the request; ``key_id``: the API key of it."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: Mapping[str, str] | None
    output_seconds: float | None
    idem_key: str | None
    body_hash: str
    key_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(NewBatch):
    """A batch. ``errors``: why its validation failed.

    While it runs its counters are those of its job; ``n_*`` and the tokens here are final ones, ``n_total`` excepted.
    """

    state: BatchState
    job_id: str | None
    model: str | None
    errors: Mapping[str, Any] | None
    n_total: int
    n_completed: int
    n_failed: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    output_file_id: str | None
    error_file_id: str | None
    lease_owner: str | None
    lease_until: float | None
    created_at: float
    expires_at: float
    in_progress_at: float | None
    finalizing_at: float | None
    completed_at: float | None
    failed_at: float | None
    cancelling_at: float | None
    cancelled_at: float | None
    expired_at: float | None

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL_BATCH


def file(row: sa.Row[Any]) -> File:
    return read(File, row, purpose=Purpose(row.purpose))
