"""The history of a model: every change leaves an event in the transaction that makes it, and none is ever changed."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from storage.errors import NotFound
from storage.registry import records
from storage.registry.records import ModelEvent, Owned
from storage.sql import tables
from storage.sql.database import Database, now
from storage.states import RevisionState

_model, _event = tables.model, tables.model_event


def record(connection: sa.Connection, model_id: str, kind: str, actor: str, **values: Any) -> None:
    """Add one event. ``values`` are columns of the table."""
    connection.execute(_event.insert().values(model_id=model_id, type=kind, at=now(), actor=actor, **values))


def events(database: Database, model: Owned) -> list[ModelEvent]:
    """All events of a model, the oldest first; also of one that was removed. Raises :class:`NotFound`."""
    mine = (_model.c.tenant == records.stored_tenant(model.tenant), _model.c.name == model.name)
    query = sa.select(_event).join(_model, _model.c.id == _event.c.model_id).where(*mine).order_by(_event.c.id)
    found = database.records(ModelEvent, query)
    if not found:  # a model begins with an event
        raise NotFound(f"there is no model {model}; 'rowmill model list' shows those there are")
    return found


def active_at(database: Database, model: Owned, at: float) -> ModelEvent | None:
    """The event that made active what was active at a time (Unix seconds); ``None`` where nothing was."""
    active = None
    for item in events(database, model):
        if item.at > at:
            break
        if item.to_state == RevisionState.ACTIVE:
            active = item
        elif item.from_state == RevisionState.ACTIVE and active is not None and active.number == item.number:
            active = None
    return active


def activations(connection: sa.Connection, model_id: str) -> list[int]:
    """The numbers of the revisions that were activated in turn, without those that a rollback has taken back.

    The last one is active now, unless it was retired.
    """
    query = sa.select(_event.c.type, _event.c.number).where(_event.c.model_id == model_id).order_by(_event.c.id)
    found: list[int] = []
    for kind, number in connection.execute(query):
        if kind == "activated":
            found.append(number)
        elif kind == "rolled_back":
            while found and found[-1] != number:
                found.pop()
    return found
