"""What is kept of registered models, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from storage.sql.registry_tables import OPERATOR
from storage.sql.row_mapping import read
from storage.states import RevisionState


class Owned(NamedTuple):
    """Names one model: ``tenant`` is ``None`` for an operator's, which every tenant may name."""

    tenant: str | None
    name: str

    def __str__(self) -> str:
        return self.name if self.tenant is None else f"{self.name} of tenant {self.tenant}"


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision of a model. ``place`` is a path, a URL or ``fake``; ``digest`` the SHA-256 (hex) of its content."""

    id: str
    model: Owned
    number: int
    state: RevisionState
    digest: str
    place: str
    task: str | None
    created_at: float

    @property
    def reference(self) -> str:
        """What a job may call it: ``NAME@2``."""
        return f"{self.model.name}@{self.number}"


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file of a revision. ``at``: where it lies from the folder of the revision (or of its graph)."""

    name: str
    at: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a validation found. ``document`` has all of it."""

    id: str
    verdict: str
    at: float
    actor: str
    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelEvent:
    """One entry of a model's history.

    ``type`` is ``added``, ``moved`` (its files lie elsewhere), ``validated``, ``activated``, ``replaced``,
    ``rolled_back``, ``retired``, ``removed``, or ``alias``. ``number`` is the revision that it is about;
    ``from_state`` and ``to_state`` are states of it, and for an alias the revisions' numbers.
    """

    at: float
    actor: str
    type: str
    number: int | None
    digest: str | None
    alias: str | None
    from_state: str | None
    to_state: str | None
    reason: str | None
    forced: bool


def stored_tenant(tenant: str | None) -> str:
    return OPERATOR if tenant is None else tenant


def owned(row: Any) -> Owned:
    """``row`` holds a model's ``tenant`` and ``name``."""
    return Owned(None if row.tenant == OPERATOR else row.tenant, row.name)


def revision(row: sa.Row[Any]) -> Revision:
    """``row`` holds the revision's columns, and the model's ``tenant`` and ``name``."""
    return read(Revision, row, model=owned(row))
