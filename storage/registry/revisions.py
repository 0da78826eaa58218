"""Models and their revisions: added, found by what a job calls them, listed and removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
import uuid_utils

from storage.errors import Conflict, NotFound
from storage.registry import history, records
from storage.registry.records import Artifact, Owned, Revision
from storage.sql import row_mapping, tables, upsert
from storage.sql.database import Database, now
from storage.states import TERMINAL_JOB, RevisionState

_model, _revision, _artifact = tables.model, tables.model_revision, tables.model_artifact
_alias, _job = tables.model_alias, tables.job
_revisions = sa.select(_revision, _model.c.tenant, _model.c.name).join(_model, _model.c.id == _revision.c.model_id)


def add(
    database: Database,
    model: Owned,
    *,
    digest: str,
    place: str,
    task: str | None,
    artifacts: Sequence[Artifact],
    actor: str,
) -> tuple[Revision, bool]:
    """A new revision, as a draft; or the one that has this content already, and then ``False``.

    Of that one the place and the task become those given, where they are others.
    """
    with database.write() as connection:
        model_id = _made(database, connection, model)
        known = connection.execute(
            sa.select(_revision).where(_revision.c.model_id == model_id, _revision.c.digest == digest)
        ).first()
        if known is not None:
            if known.place != place or (task is not None and known.task != task):
                values = {"place": place, "task": task or known.task}
                connection.execute(_revision.update().where(_revision.c.id == known.id).values(**values))
                reason = f"from {known.place} to {place}" if known.place != place else f"the task is {task}"
                history.record(connection, model_id, "moved", actor, number=known.number, digest=digest, reason=reason)
            revision_id = known.id
            connection.execute(_artifact.delete().where(_artifact.c.revision_id == revision_id))
        else:
            revision_id = str(uuid_utils.uuid7())
            number = connection.execute(
                _model.update()
                .where(_model.c.id == model_id)
                .values(last_number=_model.c.last_number + 1)
                .returning(_model.c.last_number)
            ).scalar_one()
            connection.execute(
                _revision.insert().values(
                    id=revision_id,
                    model_id=model_id,
                    number=number,
                    state=RevisionState.DRAFT,
                    digest=digest,
                    place=place,
                    task=task,
                    created_at=now(),
                )
            )
            what = {"number": number, "digest": digest, "to_state": RevisionState.DRAFT, "reason": place}
            history.record(connection, model_id, "added", actor, **what)
        if artifacts:
            rows = [{"revision_id": revision_id, **row_mapping.values(item)} for item in artifacts]
            row_mapping.insert(connection, _artifact, rows)
        return _by_id(connection, revision_id), known is None


def set_alias(database: Database, revision: Revision, alias: str, *, actor: str) -> None:
    """Let ``alias`` mean this revision, whatever it meant before."""
    with database.write() as connection:
        model_id = locked(database, connection, revision.model)
        before = connection.execute(
            sa.select(_revision.c.number)
            .join(_alias, _alias.c.revision_id == _revision.c.id)
            .where(_alias.c.model_id == model_id, _alias.c.alias == alias)
        ).scalar()
        if before == revision.number:
            return
        new = upsert.insert(connection, _alias).values(model_id=model_id, alias=alias, revision_id=revision.id)
        keys = [_alias.c.model_id, _alias.c.alias]
        connection.execute(new.on_conflict_do_update(index_elements=keys, set_={"revision_id": revision.id}))
        what = {"number": revision.number, "digest": revision.digest, "alias": alias, "to_state": str(revision.number)}
        history.record(connection, model_id, "alias", actor, **what, from_state=before and str(before))


def visible(database: Database, tenant: str | None, name: str) -> Owned | None:
    """The model that a tenant means by a name: its own before an operator's; ``None`` where there is neither.

    ``tenant`` is ``None`` for an operator, who means an operator's.
    """
    tenants = {records.stored_tenant(tenant), records.stored_tenant(None)}
    query = (
        sa.select(_model.c.tenant, _model.c.name)
        .where(_model.c.name == name, _model.c.tenant.in_(tenants))
        .where(sa.exists().where(_revision.c.model_id == _model.c.id))
        .order_by(_model.c.tenant.desc())
    )
    row = database.row(query)
    return None if row is None else records.owned(row)


def get(database: Database, model: Owned, number: int) -> Revision:
    """The revision of this number, or :class:`NotFound`."""
    row = database.row(_revisions.where(*_of(model), _revision.c.number == number))
    if row is None:
        raise NotFound(f"model {model} has no revision {number}{_those_there(database, model)}")
    return records.revision(row)


def by_alias(database: Database, model: Owned, alias: str) -> Revision:
    """The revision that an alias means, or :class:`NotFound`."""
    query = _revisions.join(_alias, _alias.c.revision_id == _revision.c.id)
    row = database.row(query.where(*_of(model), _alias.c.alias == alias))
    if row is None:
        raise NotFound(f"model {model} has no alias {alias!r}{_those_there(database, model)}")
    return records.revision(row)


def by_id(database: Database, revision_id: str) -> Revision | None:
    """The revision of this id; ``None`` for one that was removed."""
    row = database.row(_revisions.where(_revision.c.id == revision_id))
    return None if row is None else records.revision(row)


def active(database: Database, model: Owned) -> Revision | None:
    """The active revision, if any."""
    row = database.row(_revisions.where(*_of(model), _revision.c.state == RevisionState.ACTIVE))
    return None if row is None else records.revision(row)


def listed(database: Database, *, tenant: str | None = None, model: Owned | None = None) -> list[Revision]:
    """Revisions by name and number: of one model, of a tenant and the operator, or all."""
    query = _revisions.order_by(_model.c.name, _model.c.tenant, _revision.c.number)
    if model is not None:
        query = query.where(*_of(model))
    elif tenant is not None:
        query = query.where(_model.c.tenant.in_([tenant, records.stored_tenant(None)]))
    return [records.revision(row) for row in database.rows(query)]


def aliases(database: Database, model: Owned) -> dict[str, int]:
    """Alias → number of its revision, by name."""
    query = (
        sa.select(_alias.c.alias, _revision.c.number)
        .join(_revision, _revision.c.id == _alias.c.revision_id)
        .join(_model, _model.c.id == _alias.c.model_id)
        .where(*_of(model))
        .order_by(_alias.c.alias)
    )
    return {row.alias: row.number for row in database.rows(query)}


def artifacts(database: Database, revision_id: str) -> list[Artifact]:
    """The files of a revision, by name."""
    query = sa.select(_artifact).where(_artifact.c.revision_id == revision_id).order_by(_artifact.c.name)
    return database.records(Artifact, query)


def remove(database: Database, revision: Revision, *, actor: str) -> None:
    """Forget a revision with its reports and aliases; its number is not given again, and the history stays.

    Raises :class:`Conflict` for one that is active, or that a live job was submitted with.
    """
    with database.write() as connection:
        model_id = locked(database, connection, revision.model)
        found = _by_id(connection, revision.id)
        if found.state is RevisionState.ACTIVE:
            raise Conflict(f"{revision.reference} is active: 'rowmill model retire {revision.model.name}' first")
        user = connection.execute(
            sa.select(_job.c.id)
            .where(_job.c.state.not_in(TERMINAL_JOB), _job.c.model["revision_id"].as_string() == revision.id)
            .limit(1)
        ).scalar()
        if user is not None:
            raise Conflict(f"job {user} uses {revision.reference}: wait for it, or cancel it first")
        what = {"number": found.number, "digest": found.digest, "from_state": found.state}
        history.record(connection, model_id, "removed", actor, **what)
        connection.execute(_revision.delete().where(_revision.c.id == revision.id))


def locked(database: Database, connection: sa.Connection, model: Owned) -> str:
    """The model's id, its row locked until the transaction ends: changes of one model take turns."""
    return _found(model, connection.execute(database.locked(_ids(model))).scalar())


def id_of(connection: sa.Connection, model: Owned) -> str:
    """The model's id, also of one whose revisions were removed. Raises :class:`NotFound`."""
    return _found(model, connection.execute(_ids(model)).scalar())


def _ids(model: Owned) -> sa.Select[Any]:
    return sa.select(_model.c.id).where(*_of(model))


def _found(model: Owned, model_id: str | None) -> str:
    if model_id is None:
        raise NotFound(f"there is no model {model}; 'rowmill model list' shows those there are")
    return model_id


def refreshed(connection: sa.Connection, revision: Revision) -> Revision:
    """The stored revision. Raises :class:`NotFound` when it was removed."""
    return _by_id(connection, revision.id)


def numbered(connection: sa.Connection, model_id: str, number: int) -> Revision | None:
    """A revision of a model by its number; ``None`` for one that was removed."""
    row = connection.execute(_revisions.where(_model.c.id == model_id, _revision.c.number == number)).first()
    return None if row is None else records.revision(row)


def _made(database: Database, connection: sa.Connection, model: Owned) -> str:
    values = {"id": str(uuid_utils.uuid7()), "tenant": records.stored_tenant(model.tenant), "name": model.name}
    connection.execute(upsert.insert(connection, _model).values(**values, created_at=now()).on_conflict_do_nothing())
    return locked(database, connection, model)


def _by_id(connection: sa.Connection, revision_id: str) -> Revision:
    row = connection.execute(_revisions.where(_revision.c.id == revision_id)).first()
    if row is None:
        raise NotFound("the revision was removed meanwhile")
    return records.revision(row)


def _of(model: Owned) -> tuple[sa.ColumnElement[bool], ...]:
    return _model.c.tenant == records.stored_tenant(model.tenant), _model.c.name == model.name


def _those_there(database: Database, model: Owned) -> str:
    numbers = [str(item.number) for item in listed(database, model=model)]
    if not numbers:
        return "; 'rowmill model list' shows the models there are"
    named = aliases(database, model)
    more = f", and aliases {', '.join(named)}" if named else ""
    return f"; it has revisions {', '.join(numbers)}{more}"
