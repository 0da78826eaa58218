"""The states of revisions: the only writer of them. One revision of a model is active at a time, whoever activates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from storage.errors import ActivationRefused
from storage.registry import history, reports, revisions
from storage.registry.records import Owned, Report, Revision
from storage.sql import tables
from storage.sql.database import Database
from storage.states import RevisionState, check

_revision = tables.model_revision


class _Change(NamedTuple):
    """What the history says of a change, and of who made it."""

    type: str
    actor: str
    reason: str | None
    forced: bool = False


def activate(
    database: Database,
    revision: Revision,
    *,
    replacing: Revision | None,
    actor: str,
    reason: str | None = None,
    forced: bool = False,
) -> Revision:
    """Make a revision active in the place of ``replacing`` (``None``: of none), which retires.

    Raises :class:`ActivationRefused`, and changes nothing, when it is active already, when another one is active than
    the caller has seen, and, unless ``forced``, when its newest validation did not pass.
    """
    change = _Change("activated", actor, reason, forced)
    return _exchange(database, revision, replacing, change, prove=not forced)


def previous(database: Database, model: Owned) -> Revision:
    """The revision that a rollback would make active. Raises :class:`ActivationRefused` when there is none."""
    with database.read() as connection:
        model_id = revisions.id_of(connection, model)
        for number in reversed(history.activations(connection, model_id)):
            found = revisions.numbered(connection, model_id, number)
            if found is not None and found.state is not RevisionState.ACTIVE:
                return found
    raise ActivationRefused(f"no other revision of {model} was active before: there is nothing to go back to")


def roll_back(
    database: Database, target: Revision, *, replacing: Revision | None, actor: str, reason: str | None = None
) -> Revision:
    """Make the revision active that was so before. Raises :class:`ActivationRefused` as :func:`activate` does."""
    return _exchange(database, target, replacing, _Change("rolled_back", actor, reason), prove=False)


def retire(database: Database, revision: Revision, *, actor: str, reason: str | None = None) -> Revision:
    """Withdraw a revision. Raises :class:`IllegalTransition` for one that is retired."""
    with database.write() as connection:
        model_id = revisions.locked(database, connection, revision.model)
        current = revisions.refreshed(connection, revision)
        _move(connection, model_id, current, RevisionState.RETIRED, _Change("retired", actor, reason))
        return revisions.refreshed(connection, revision)


def judged(database: Database, revision: Revision, report: Report) -> Revision:
    """Store what a validation found, and move the revision: a PASS proves a draft, anything else takes that back.

    An active one stays active, and a retired one is proved by a PASS only.
    """
    passed = report.verdict == reports.PASS
    with database.write() as connection:
        model_id = revisions.locked(database, connection, revision.model)
        current = revisions.refreshed(connection, revision)
        reports.insert(connection, current.id, report)
        target = RevisionState.VALIDATED if passed else RevisionState.DRAFT
        change = _Change("validated", report.actor, f"{report.verdict}, report {report.id}")
        if (passed and current.state in (RevisionState.DRAFT, RevisionState.RETIRED)) or (
            not passed and current.state is RevisionState.VALIDATED
        ):
            _move(connection, model_id, current, target, change)
        else:
            _record(connection, model_id, current, current.state, change)
        return revisions.refreshed(connection, revision)


def _require_pass(revision: Revision, report: Report | None) -> None:
    if report is None:
        raise ActivationRefused(
            f"{revision.reference} was not validated: 'rowmill model validate {revision.reference} SAMPLE -t TASK' "
            "first; --force (force=True) activates it all the same, and the history says so"
        )
    if report.verdict != reports.PASS:
        raise ActivationRefused(
            f"the newest validation of {revision.reference} ended in {report.verdict} (report {report.id}); --force "
            "(force=True) activates it all the same, and the history says so"
        )


@contextmanager
def _one_active(database: Database, revision: Revision) -> Iterator[sa.Connection]:
    """A write transaction in which the index that lets one revision be active may refuse."""
    try:
        with database.write() as connection:
            yield connection
    except IntegrityError as conflict:
        raise ActivationRefused(f"another revision of {revision.model} became active meanwhile") from conflict


def _exchange(
    database: Database, revision: Revision, replacing: Revision | None, change: _Change, *, prove: bool
) -> Revision:
    with _one_active(database, revision) as connection:
        model_id = revisions.locked(database, connection, revision.model)
        current = revisions.refreshed(connection, revision)
        if current.state is RevisionState.ACTIVE:
            raise ActivationRefused(f"{current.reference} is active already")
        if prove:
            _require_pass(current, reports.newest(connection, current.id))
        query = sa.select(_revision.c.id, _revision.c.number).where(
            _revision.c.model_id == model_id, _revision.c.state == RevisionState.ACTIVE
        )
        now_active = connection.execute(query).first()
        if (now_active.id if now_active else None) != (replacing.id if replacing else None):
            found, seen = (f"revision {item.number}" if item else "none" for item in (now_active, replacing))
            raise ActivationRefused(
                f"{found} of {revision.model} is active now, {seen} was when this began: look at it, and try again"
            )
        if replacing is not None:
            why = f"by {current.reference}" + (", a rollback" if change.type == "rolled_back" else "")
            before = revisions.refreshed(connection, replacing)
            _move(connection, model_id, before, RevisionState.RETIRED, _Change("replaced", change.actor, why))
        _move(connection, model_id, current, RevisionState.ACTIVE, change)
        return revisions.refreshed(connection, revision)


def _move(connection: sa.Connection, model_id: str, revision: Revision, target: RevisionState, change: _Change) -> None:
    check(revision.state, target)
    mine = (_revision.c.id == revision.id, _revision.c.state == revision.state)
    connection.execute(_revision.update().where(*mine).values(state=target))
    _record(connection, model_id, revision, target, change)


def _record(
    connection: sa.Connection, model_id: str, revision: Revision, target: RevisionState, change: _Change
) -> None:
    what = {"number": revision.number, "digest": revision.digest, "from_state": revision.state, "to_state": target}
    history.record(connection, model_id, change.type, change.actor, **what, reason=change.reason, forced=change.forced)
