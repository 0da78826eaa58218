"""How an attempt ends, and its resume points: flush, commit, fail, release, cancel. One transaction each, all fenced.

Lock order everywhere: the job's row first, then the shard's (the other way round was measured to deadlock).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from pyroaring import BitMap

from storage.deaths import CAREFUL_AFTER, Step, after_crash
from storage.errors import CommitUnknown, LeaseLost, Unreachable
from storage.queue.job_progress import close_shard, fail_whole, locked_job
from storage.records import Claim, Computed, PartFile, RowException
from storage.sql import row_mapping, tables
from storage.sql.database import Database, now
from storage.sql.transitions import move_attempt, move_shard, record
from storage.states import AttemptState, JobState, ShardState

ROW_EXCEPTIONS_KEPT = 100
"""Failed rows of a shard whose detail is kept in SQL; all of them are in the output's ``error`` column."""


def flush(
    database: Database,
    claim: Claim,
    part: PartFile,
    *,
    tokens: Mapping[str, int],
    exceptions: Sequence[RowException] = (),
    n_poison: int = 0,
) -> None:
    """Make a part file, already stored and verified, a resume point. Raises :class:`LeaseLost` when fenced.

    ``n_poison`` of its rows were not computed: they become row errors because they kill the engine. Safe to repeat: a
    flush that an earlier, unanswered COMMIT made is left unchanged.
    """
    try:
        _flush(database, claim, part, tokens, exceptions, n_poison)
    except CommitUnknown as error:
        with database.read() as connection:
            if _is_flushed(connection, claim, part):
                return
        raise Unreachable(f"flush of shard {claim.shard.id} did not take effect") from error


def _is_flushed(connection: sa.Connection, claim: Claim, part: PartFile) -> bool:
    table = tables.part_file
    query = sa.select(table.c.seq).where(
        table.c.shard_id == claim.shard.id, table.c.attempt_no == part.attempt_no, table.c.seq == part.seq
    )
    return connection.execute(query).first() is not None


def _flush(
    database: Database,
    claim: Claim,
    part: PartFile,
    tokens: Mapping[str, int],
    exceptions: Sequence[RowException],
    n_poison: int,
) -> None:
    with database.write() as connection:
        held = held_row(database, connection, claim)
        if _is_flushed(connection, claim, part):
            return  # an earlier COMMIT, whose answer was lost, landed after all
        connection.execute(tables.part_file.insert().values(shard_id=claim.shard.id, **row_mapping.values(part)))
        _count(connection, claim, held, part, tokens, exceptions, n_poison)
        data = {"seq": part.seq, "rows": len(part.rows), "failed": len(part.failed), "bytes": part.n_bytes}
        _record(connection, claim, "shard.flush", data)


def _count(
    connection: sa.Connection,
    claim: Claim,
    held: sa.Row[Any],
    part: PartFile,
    tokens: Mapping[str, int],
    exceptions: Sequence[RowException],
    n_poison: int,
) -> None:
    """Count the rows of a file that this attempt has computed: they are durable with this transaction."""
    done, failed = held.done | part.rows, held.failed | part.failed
    room = ROW_EXCEPTIONS_KEPT - held.n_failed
    if exceptions and room > 0:
        kept = [
            {"shard_id": claim.shard.id, "row_idx": item.row, "code": item.code, "message": item.message}
            for item in exceptions[:room]
        ]
        row_mapping.insert(connection, tables.row_exception, kept)
    shard = tables.shard
    connection.execute(
        shard.update()
        .where(shard.c.id == claim.shard.id)
        .values(
            **_flushed(done, failed),
            # Progress forgives crashes, but not those of a search, nor what ``end_search`` noted.
            n_crash=held.n_crash if held.n_crash >= CAREFUL_AFTER - 1 else 0,
            **{name: shard.c[name] + count for name, count in tokens.items()},
        )
    )
    attempt = tables.attempt
    connection.execute(
        attempt.update()
        .where(attempt.c.shard_id == claim.shard.id, attempt.c.attempt_no == claim.attempt_no)
        .values(rows_computed=attempt.c.rows_computed + len(part.rows), n_poison=attempt.c.n_poison + n_poison)
    )


def note(database: Database, claim: Claim, step: Step, alone: BitMap | None = None) -> None:
    """Note what the attempt is at from now on; ``alone``: the only rows that are inside an engine of its process.

    Raises :class:`LeaseLost` when the attempt is over.
    """
    attempt = tables.attempt
    mine = (attempt.c.shard_id == claim.shard.id, attempt.c.attempt_no == claim.attempt_no)
    running = attempt.c.state == AttemptState.RUNNING
    if database.change(attempt.update().where(*mine, running).values(step=step, alone=alone)) != 1:
        raise LeaseLost(f"attempt {claim.attempt_no} no longer holds shard {claim.shard.id}")


def end_search(database: Database, claim: Claim) -> None:
    """Note that no row is suspected any more. The next crash searches at once: there may be other poison rows."""
    shard = tables.shard
    with database.write() as connection:
        held_row(database, connection, claim)
        values = {"suspect": None, "n_crash": CAREFUL_AFTER - 1}
        connection.execute(shard.update().where(shard.c.id == claim.shard.id).values(**values))


def commit(
    database: Database,
    claim: Claim,
    output: PartFile,
    *,
    stats: Mapping[str, Any],
    computed: Computed | None = None,
) -> JobState:
    """Make ``output`` the shard's final file; the last shard in moves its job to ``finalizing``.

    ``computed``: what is to be counted of its rows, where none of them has been flushed before.

    Returns the job's state afterwards. Raises :class:`LeaseLost` when fenced (the attempt is then superseded), and
    :class:`Unreachable` when the outcome of the COMMIT was lost and reading again shows that it did not take effect:
    committing again is safe, and deletes nothing.
    """
    try:
        with database.write() as connection:
            job = locked_job(database, connection, claim.job.id)
            held = held_row(database, connection, claim)
            connection.execute(tables.part_file.insert().values(shard_id=claim.shard.id, **row_mapping.values(output)))
            if computed is not None:
                _count(connection, claim, held, output, computed.tokens, computed.exceptions, 0)
                held = held_row(database, connection, claim)
            if len(output.failed) > held.n_failed:
                # Rows that were computed, and whose kept columns hold what no output may.
                values = {"failed": output.failed, "n_failed": len(output.failed)}
                connection.execute(tables.shard.update().where(tables.shard.c.id == claim.shard.id).values(**values))
                held = held_row(database, connection, claim)
            move_shard(
                connection,
                held,
                ShardState.COMMITTED,
                claim.owner,
                committed_attempt=claim.attempt_no,
                data={"rows": held.n_done, "failed": held.n_failed},
            )
            _end_attempt(connection, claim, AttemptState.SUCCEEDED, stats=dict(stats))
            return close_shard(connection, job, claim.owner, committed=held)
    except LeaseLost:
        # An earlier COMMIT of ours, whose answer was lost, may have landed after all.
        state = _committed(database, claim)
        if state is None:
            supersede(database, claim)
            raise
        return state
    except CommitUnknown as error:
        state = _committed(database, claim)
        if state is None:
            raise Unreachable(f"the commit of shard {claim.shard.id} did not take effect") from error
        return state


def _committed(database: Database, claim: Claim) -> JobState | None:
    """The job's state if this very attempt is the one that was committed, else ``None``."""
    shard, job = tables.shard, tables.job
    query = sa.select(job.c.state).join(shard, job.c.id == shard.c.job_id)
    won = (shard.c.id == claim.shard.id, shard.c.committed_attempt == claim.attempt_no)
    state: JobState | None = database.scalar(query.where(*won))
    return state


def fail(
    database: Database,
    claim: Claim,
    error: str,
    *,
    delay: float,
    max_failures: int,
    max_losses: int = 8,
    crash: bool = False,
    stats: Mapping[str, Any] | None = None,
) -> ShardState:
    """End the attempt as failed. Its shard is ready again after ``delay`` seconds, or fails after ``max_failures``.

    ``crash`` says that the engine died under its rows. That costs nothing while a poison row is searched for, nor when
    the attempt had flushed some: the shard comes to an end, however often its engine dies. A search that ends without a
    computed row counts as a loss; after ``max_losses`` of them the shard fails, since every row seems to kill the
    engine.
    """
    with database.write() as connection:
        job = locked_job(database, connection, claim.job.id)
        held = held_row(database, connection, claim)
        attempt = read_attempt(connection, claim.shard.id, claim.attempt_no)
        values: dict[str, Any] = {"n_fail": held.n_fail, "n_crash": held.n_crash, "n_lost": held.n_lost}
        if crash:
            progress, alone = has_progress(attempt), attempt.alone is not None
            cost = after_crash(held.n_crash, held.n_lost, progress=progress, alone=alone)
            searching = cost.crashes >= CAREFUL_AFTER
            values["n_fail"] += not searching and not progress
            values["n_crash"] = cost.crashes
            if searching:
                values["n_lost"] = cost.losses
            values |= suspects(attempt, opens=cost.opens)
            fails = cost.is_spent(max_losses) if searching else values["n_fail"] >= max_failures
        else:
            values["n_fail"] += 1
            fails = values["n_fail"] >= max_failures
        target = ShardState.FAILED if fails else ShardState.READY
        move_shard(
            connection,
            held,
            target,
            claim.owner,
            error=error,
            run_after=now() + delay,
            data={"error": error, "failures": values["n_fail"], "crashes": values["n_crash"]},
            **values,
        )
        _end_attempt(connection, claim, AttemptState.FAILED, error=error, stats=dict(stats or {}))
        if target is ShardState.FAILED:
            close_shard(connection, job, claim.owner, failed=True)
    return target


def read_attempt(connection: sa.Connection, shard_id: str, attempt_no: int) -> sa.Row[Any]:
    """The row of an attempt."""
    attempt = tables.attempt
    query = sa.select(attempt).where(attempt.c.shard_id == shard_id, attempt.c.attempt_no == attempt_no)
    return connection.execute(query).one()


def has_progress(attempt: sa.Row[Any]) -> bool:
    """Whether an attempt has flushed a row that was computed."""
    return bool(attempt.rows_computed > attempt.n_poison)


def suspects(attempt: sa.Row[Any], *, opens: bool) -> dict[str, Any]:
    """The suspects after a crash of the attempt: what ran alone; all rows, where a search begins."""
    if attempt.alone is not None:
        return {"suspect": attempt.alone}
    return {"suspect": None} if opens else {}


def fail_job(database: Database, claim: Claim, error: str, *, stats: Mapping[str, Any] | None = None) -> None:
    """Fail the shard, and begin to stop its job: another attempt cannot help, since the input changed or the model is
    broken. The finalizer then moves the job to ``failed``; ``job retry`` may open it again."""
    with database.write() as connection:
        job = locked_job(database, connection, claim.job.id)
        held = held_row(database, connection, claim)
        move_shard(connection, held, ShardState.FAILED, claim.owner, error=error, data={"error": error})
        _end_attempt(connection, claim, AttemptState.FAILED, error=error, stats=dict(stats or {}))
        fail_whole(connection, job, error, claim.owner)
        close_shard(connection, locked_job(database, connection, claim.job.id), claim.owner, failed=True)


def release(
    database: Database, claim: Claim, *, stats: Mapping[str, Any] | None = None, error: str | None = None
) -> None:
    """Hand the shard back, flushed, at no cost to its budgets: the worker drains, was interrupted, or lost its engine
    to the rows of another shard (``error``)."""
    with database.write() as connection:
        held = held_row(database, connection, claim)
        move_shard(connection, held, ShardState.READY, claim.owner, data={"released": True})
        _end_attempt(connection, claim, AttemptState.RELEASED, stats=dict(stats or {}), error=error)


def cancel(database: Database, claim: Claim, *, stats: Mapping[str, Any] | None = None) -> None:
    """End the attempt because its job is being wound down. What was flushed stays, for the partial output."""
    with database.write() as connection:
        job = locked_job(database, connection, claim.job.id)
        held = held_row(database, connection, claim)
        move_shard(connection, held, ShardState.CANCELLED, claim.owner)
        _end_attempt(connection, claim, AttemptState.CANCELLED, stats=dict(stats or {}))
        close_shard(connection, job, claim.owner)


def supersede(database: Database, claim: Claim) -> None:
    """Note that an attempt came back too late. It wrote nothing, and nothing else changes."""
    shard = tables.shard
    gone = sa.or_(shard.c.attempt_no > claim.attempt_no, shard.c.state != ShardState.RUNNING)
    with database.write() as connection:
        if connection.execute(sa.select(shard.c.id).where(shard.c.id == claim.shard.id, gone)).first() is None:
            return
        for source in (AttemptState.LOST, AttemptState.RUNNING):
            if move_attempt(connection, claim.shard.id, claim.attempt_no, source, AttemptState.SUPERSEDED):
                _record(connection, claim, "attempt.superseded")
                return


def drop_corrupt_parts(
    database: Database,
    claim: Claim,
    corrupt: Sequence[PartFile],
    intact: Sequence[PartFile],
    *,
    tokens: Mapping[str, int],
) -> None:
    """Take back what the ``corrupt`` part files had made durable, so that their rows are computed again.

    ``tokens`` are the totals of the ``intact`` ones. Fenced: raises :class:`LeaseLost`, and nothing has changed, when
    the attempt no longer holds the shard.
    """
    done = BitMap.union(BitMap(), *(part.rows for part in intact))
    failed = BitMap.union(BitMap(), *(part.failed for part in intact))
    shard, part, exception = tables.shard, tables.part_file, tables.row_exception
    with database.write() as connection:
        held_row(database, connection, claim)
        gone = sa.tuple_(part.c.attempt_no, part.c.seq).in_([(item.attempt_no, item.seq) for item in corrupt])
        connection.execute(part.delete().where(part.c.shard_id == claim.shard.id, gone))
        known = sa.select(exception.c.row_idx).where(exception.c.shard_id == claim.shard.id)
        stale = [row for row in connection.execute(known).scalars() if row not in failed]
        connection.execute(
            exception.delete().where(exception.c.shard_id == claim.shard.id, exception.c.row_idx.in_(stale))
        )
        connection.execute(
            shard.update().where(shard.c.id == claim.shard.id).values(**_flushed(done, failed), **tokens)
        )
        for item in corrupt:
            _record(connection, claim, "shard.part_lost", {"uri": item.uri, "rows": len(item.rows)})


def held_row(database: Database, connection: sa.Connection, claim: Claim) -> sa.Row[Any]:
    """The shard's row, locked, if this attempt still holds it; else :class:`LeaseLost`."""
    shard = tables.shard
    row = connection.execute(
        database.locked(
            sa.select(shard).where(
                shard.c.id == claim.shard.id,
                shard.c.attempt_no == claim.attempt_no,
                shard.c.lease_owner == claim.owner,
                shard.c.state == ShardState.RUNNING,
            )
        )
    ).first()
    if row is None:
        raise LeaseLost(f"attempt {claim.attempt_no} no longer holds shard {claim.shard.id}")
    return row


def _end_attempt(connection: sa.Connection, claim: Claim, target: AttemptState, **values: Any) -> None:
    move_attempt(connection, claim.shard.id, claim.attempt_no, AttemptState.RUNNING, target, **values)


def _flushed(done: BitMap, failed: BitMap) -> dict[str, Any]:
    return {"done": done, "failed": failed, "n_done": len(done), "n_failed": len(failed)}


def _record(connection: sa.Connection, claim: Claim, kind: str, data: Mapping[str, Any] | None = None) -> None:
    shard_id, number = claim.shard.id, claim.attempt_no
    record(connection, claim.job.id, kind, claim.owner, shard_id=shard_id, attempt_no=number, data=data)
