"""The SQLAlchemy tables. Migrations are made from these; nothing else defines a column.

Times are Unix seconds as doubles, written by the database's own clock (``storage.sql.database.now``), so that SQLite
and PostgreSQL hold the same values. Bitmaps hold row indices within the shard. A column is known to Python by the name
of its record's field, which may differ from its name in the database.
"""

from __future__ import annotations

import sqlalchemy as sa

from storage.deaths import Step
from storage.records import TOKENS as TOKENS
from storage.sql.column_types import Id, Json, Rows, Slices, State, Text
from storage.sql.file_tables import batch as batch
from storage.sql.file_tables import file as file
from storage.sql.key_tables import api_key as api_key
from storage.sql.key_tables import api_key_event as api_key_event
from storage.sql.registry_tables import model as model
from storage.sql.registry_tables import model_alias as model_alias
from storage.sql.registry_tables import model_artifact as model_artifact
from storage.sql.registry_tables import model_event as model_event
from storage.sql.registry_tables import model_report as model_report
from storage.sql.registry_tables import model_revision as model_revision
from storage.sql.schema import Big, ExactJson, Seconds, none_of, one_of
from storage.sql.schema import metadata as metadata
from storage.states import TERMINAL_JOB, AttemptState, FireState, JobState, ShardState


def _count(name: str, key: str | None = None) -> sa.Column[int]:
    return sa.Column(name, Big, key=key or name, nullable=False, server_default="0")


def _tokens() -> tuple[sa.Column[int], ...]:
    return tuple(_count(name) for name in TOKENS)


tenant = sa.Table(
    "tenant",
    metadata,
    sa.Column("name", Text, primary_key=True),
    sa.Column("weight", sa.Double, nullable=False, server_default="1"),
    sa.Column("max_running", sa.Integer),
    sa.Column("max_jobs", sa.Integer),
    sa.Column("rows_per_day", Big),
    sa.Column("tokens_per_day", Big),
    sa.Column("created_at", Seconds, nullable=False),
    sa.CheckConstraint("weight > 0", name="weight"),
    postgresql_with={"fillfactor": "70"},
)

tenant_share = sa.Table(
    "tenant_share",
    metadata,
    sa.Column("queue", Text, primary_key=True),
    sa.Column("priority", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("vtime", sa.Double, nullable=False),
    sa.Column("vstart", sa.Double, nullable=False),
    postgresql_with={"fillfactor": "70"},
)
"""``vtime`` is where the tenant's next contested claim in this queue and priority starts in virtual time, ``vstart``
where virtual time stood there at its last one (``storage.queue.fair_queue``)."""

tenant_usage = sa.Table(
    "tenant_usage",
    metadata,
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
    _count("rows"),
    _count("tokens"),
    postgresql_with={"fillfactor": "70"},
)
"""``day`` counts UTC days since 1970-01-01, by the database's clock."""

_LIVE_JOB = none_of(TERMINAL_JOB)
_DELETED = sa.text("deleted_at IS NOT NULL")

job = sa.Table(
    "job",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("tenant", Text, nullable=False),
    sa.Column("state", State(JobState), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("queue", Text, nullable=False),
    sa.Column("engine", Text, nullable=False),
    sa.Column("engine_key", Text, nullable=False),
    sa.Column("spec", ExactJson, nullable=False),
    sa.Column("spec_hash", Text, nullable=False),
    sa.Column("idem_key", Text, key="idempotency_key"),
    sa.Column("plan", ExactJson, nullable=False, server_default="{}"),
    # The registered revision that the job's model was resolved to at submit; NULL for a path.
    sa.Column("model", sa.JSON(none_as_null=True)),
    sa.Column("output_uri", Text, nullable=False),
    sa.Column("stop_reason", Text),
    sa.Column("error", Text),
    sa.Column("gen", sa.Integer, nullable=False, server_default="0"),
    _count("n_shards"),
    _count("n_open"),
    _count("n_dead", key="n_failed_shards"),
    _count("rows_total"),
    _count("rows_done"),
    _count("rows_failed"),
    *_tokens(),
    sa.Column("max_failed_rows", Big),
    sa.Column("finalize_epoch", sa.Integer, nullable=False, server_default="0"),
    sa.Column("publishing", sa.Boolean, nullable=False, server_default=sa.text("false")),
    # A finalizer that had lost its lease may have disturbed what is published.
    sa.Column("touched", sa.Boolean, key="needs_republish", nullable=False, server_default=sa.text("false")),
    # How often a process died while it planned or published the job.
    sa.Column("n_lost", sa.Integer, nullable=False, server_default="0"),
    sa.Column("finalize_owner", Text),
    sa.Column("finalize_until", Seconds),
    sa.Column("created_at", Seconds, nullable=False),
    sa.Column("started_at", Seconds),
    sa.Column("ended_at", Seconds),
    sa.Column("expires_at", Seconds),
    sa.Column("cancel_requested_at", Seconds),
    # Set for a job that is being deleted: nobody sees it any more (storage.queue.deletion).
    sa.Column("deleted_at", Seconds),
    # A newer job has published at the same output, and was deleted.
    sa.Column("overtaken", sa.Boolean, nullable=False, server_default=sa.text("false")),
    one_of(JobState),
    sa.Index("ix_job_deleted_at", "deleted_at", sqlite_where=_DELETED, postgresql_where=_DELETED),
    sa.Index("uq_job_tenant_idem_key", "tenant", "idempotency_key", unique=True),
    sa.Index("uq_job_live_output", "output_uri", unique=True, sqlite_where=_LIVE_JOB, postgresql_where=_LIVE_JOB),
    sa.Index("ix_job_output_uri", "output_uri"),
    sa.Index("ix_job_touched", "id", sqlite_where=sa.text("touched"), postgresql_where=sa.text("touched")),
    sa.Index("ix_job_live_state", "state", sqlite_where=_LIVE_JOB, postgresql_where=_LIVE_JOB),
    sa.Index("ix_job_live_tenant", "tenant", sqlite_where=_LIVE_JOB, postgresql_where=_LIVE_JOB),
)

source = sa.Table(
    "source",
    metadata,
    sa.Column("job_id", Id, sa.ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("idx", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("uri", Text, nullable=False),
    sa.Column("etag", Text, nullable=False),
    sa.Column("n_bytes", Big, nullable=False),
    sa.Column("n_rows", Big, nullable=False),
    sa.Column("partition", ExactJson, nullable=False),
    # Of a file that holds rows of the input in another order than the input's: which rows.
    sa.Column("rows_bm", Rows, key="rows"),
)

_READY = sa.text("state = 'ready'")
_RUNNING = sa.text("state = 'running'")
_PENDING = sa.text("state = 'pending'")
FAILING = sa.text("shard.state <> 'committed' AND shard.n_failed > 0")
"""Shards with failed rows that are not in their job's counters yet."""

shard = sa.Table(
    "shard",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("job_id", Id, sa.ForeignKey("job.id", ondelete="CASCADE"), nullable=False),
    sa.Column("gen", sa.Integer, nullable=False),
    sa.Column("idx", sa.Integer, nullable=False),
    sa.Column("tenant", Text, nullable=False),
    sa.Column("queue", Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("engine_key", Id, nullable=False, server_default=sa.text("''")),
    sa.Column("state", State(ShardState), nullable=False),
    sa.Column("row_start", Big, nullable=False),
    sa.Column("row_n", sa.Integer, nullable=False),
    sa.Column("slices", Slices, nullable=False),
    sa.Column("select_bm", Rows, key="select"),
    sa.Column("done_bm", Rows(or_empty=True), key="done"),
    sa.Column("failed_bm", Rows(or_empty=True), key="failed"),
    _count("n_done"),
    _count("n_failed"),
    sa.Column("run_after", Seconds, nullable=False, server_default="0"),
    sa.Column("attempt_no", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lease_owner", Text),
    sa.Column("lease_until", Seconds),
    sa.Column("committed_attempt", sa.Integer),
    sa.Column("n_fail", sa.Integer, nullable=False, server_default="0"),
    sa.Column("n_lost", sa.Integer, nullable=False, server_default="0"),
    sa.Column("n_crash", sa.Integer, nullable=False, server_default="0"),
    sa.Column("suspect_bm", Rows, key="suspect"),
    *_tokens(),
    sa.Column("error", Text),
    one_of(ShardState),
    sa.CheckConstraint("state <> 'running' OR (lease_owner IS NOT NULL AND lease_until IS NOT NULL)", name="leased"),
    sa.UniqueConstraint("job_id", "gen", "idx"),
    # The lease is not indexed, so that heartbeats stay heap-only updates; running shards are few.
    sa.Index("ix_shard_running", "tenant", "id", sqlite_where=_RUNNING, postgresql_where=_RUNNING),
    postgresql_with={"fillfactor": "70"},
)

# A claim reads one row off the front of one of these, however many shards there are. The first is read flow by flow
# (storage.queue.fair_queue), all of it ascending so that one row comparison leads from a flow to the next.
_READY_ORDERS = {
    "ix_shard_ready": (shard.c.queue, shard.c.priority, shard.c.tenant, shard.c.engine_key),
    "ix_shard_ready_of_job": (shard.c.job_id, shard.c.priority.desc()),
}
for _name, _first in _READY_ORDERS.items():
    _order = (*_first, shard.c.run_after, shard.c.id)
    sa.Index(_name, *_order, sqlite_where=_READY, postgresql_where=_READY)

_FAILING = sa.text("state <> 'committed' AND n_failed > 0")
sa.Index("ix_shard_failing", shard.c.job_id, shard.c.n_failed, sqlite_where=_FAILING, postgresql_where=_FAILING)

attempt = sa.Table(
    "attempt",
    metadata,
    sa.Column("shard_id", Id, sa.ForeignKey("shard.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("attempt_no", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("worker_id", Text, nullable=False),
    sa.Column("state", State(AttemptState), nullable=False),
    sa.Column("started_at", Seconds, nullable=False),
    sa.Column("ended_at", Seconds),
    _count("rows_resumed"),
    _count("rows_computed"),
    # Of those, rows that were not computed but found to kill the engine: no progress.
    sa.Column("n_poison", sa.Integer, nullable=False, server_default="0"),
    sa.Column("step", State(Step), nullable=False, server_default=Step.LOADING),
    sa.Column("alone_bm", Rows, key="alone"),
    sa.Column("stats", Json, nullable=False, server_default="{}"),
    sa.Column("error", Text),
)

part_file = sa.Table(
    "part_file",
    metadata,
    sa.Column("shard_id", Id, sa.ForeignKey("shard.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("attempt_no", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("uri", Text, nullable=False),
    sa.Column("n_bytes", Big, nullable=False),
    sa.Column("sha256", Text, nullable=False),
    sa.Column("etag", Text, nullable=False),
    sa.Column("rows_bm", Rows, key="rows", nullable=False),
    sa.Column("failed_bm", Rows, key="failed", nullable=False),
)

row_exception = sa.Table(
    "row_exception",
    metadata,
    sa.Column("shard_id", Id, sa.ForeignKey("shard.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("row_idx", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("code", Text, nullable=False),
    sa.Column("message", Text, nullable=False),
)

event = sa.Table(
    "event",
    metadata,
    sa.Column("id", Big, primary_key=True),
    sa.Column("job_id", Id, sa.ForeignKey("job.id", ondelete="CASCADE"), nullable=False),
    sa.Column("shard_id", Id),
    sa.Column("attempt_no", sa.Integer),
    sa.Column("type", Text, nullable=False),
    sa.Column("at", Seconds, nullable=False),
    sa.Column("actor", Text, nullable=False),
    sa.Column("data", Json, nullable=False, server_default="{}"),
    sa.Index("ix_event_job_id_id", "job_id", "id"),
)

worker = sa.Table(
    "worker",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("host", Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("pid_started_at", Seconds, nullable=False),
    sa.Column("boot_id", Text),
    sa.Column("start_ticks", Big),
    sa.Column("started_at", Seconds, nullable=False),
    sa.Column("heartbeat_at", Seconds, nullable=False),
    sa.Column("engines", Json, nullable=False, server_default="[]"),
    sa.Column("queues", Json, nullable=False, server_default="[]"),
    sa.Column("slots", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lease_seconds", Seconds, nullable=False, server_default="60"),
    sa.Column("version", Text, nullable=False, server_default="unknown"),
    sa.Column("draining", sa.Boolean, nullable=False, server_default=sa.text("false")),
    sa.Column("warm", Json, nullable=False, server_default="[]"),
    sa.Column("trouble", Text),
    sa.Column("dropped_messages", Big, nullable=False, server_default="0"),
    sa.Column("offers", Json, nullable=False, server_default="{}"),
)

# Of processes in the embedded mode, from before their first claim to the end of the job. A killed one leaves its row.
attendance = sa.Table(
    "attendance",
    metadata,
    sa.Column("job_id", Id, sa.ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("worker_id", Text, primary_key=True),
)

gc_queue = sa.Table(
    "gc_queue",
    metadata,
    sa.Column("uri", Text, primary_key=True),
    sa.Column("job_id", Id, sa.ForeignKey("job.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("not_before", Seconds, nullable=False),
    sa.Column("n_fail", sa.Integer, nullable=False, server_default="0"),
)

# One row: when the last round of maintenance began.
tick = sa.Table(
    "tick",
    metadata,
    sa.Column("name", Text, primary_key=True),
    sa.Column("at", Seconds, nullable=False),
)

schedule = sa.Table(
    "schedule",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("tenant", Text, nullable=False),
    sa.Column("name", Id, nullable=False),
    sa.Column("cron", Text, nullable=False),
    sa.Column("tz", Text, nullable=False),
    sa.Column("spec", ExactJson, nullable=False),
    sa.Column("overlap", Text, nullable=False),
    sa.Column("misfire", Text, nullable=False),
    sa.Column("misfire_grace", Seconds),
    sa.Column("incremental", sa.Boolean, nullable=False),
    sa.Column("paused", sa.Boolean, nullable=False, server_default=sa.text("false")),
    sa.Column("next_at", Seconds, nullable=False),
    sa.Column("created_at", Seconds, nullable=False),
    sa.UniqueConstraint("tenant", "name"),
)

# The primary key is what lets each time fire once, however many beats run.
schedule_fire = sa.Table(
    "schedule_fire",
    metadata,
    sa.Column("schedule_id", Id, sa.ForeignKey("schedule.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("fire_at", Seconds, primary_key=True, autoincrement=False),
    sa.Column("state", State(FireState), nullable=False),
    sa.Column("job_id", Id, sa.ForeignKey("job.id", ondelete="SET NULL")),
    sa.Column("reason", Text),
    _count("missed"),
    sa.Column("decided_at", Seconds, nullable=False),
    sa.Column("settled_at", Seconds),
    one_of(FireState),
    sa.Index("ix_schedule_fire_job_id", "job_id"),
    sa.Index("ix_schedule_fire_pending", "fire_at", sqlite_where=_PENDING, postgresql_where=_PENDING),
)

# The files that a fire's job took when it was planned, under the names the user knows (input that is converted has
# chunks for sources). done_at: when that job completed for the first time; a retry of it does not take that back, nor
# does its deletion: job_id may name a job that is gone.
schedule_file = sa.Table(
    "schedule_file",
    metadata,
    sa.Column("job_id", Id, primary_key=True),
    sa.Column("uri", Id, primary_key=True),
    sa.Column("schedule_id", Id, sa.ForeignKey("schedule.id", ondelete="CASCADE"), nullable=False),
    sa.Column("etag", Text, nullable=False),
    sa.Column("done_at", Seconds),
    sa.Index("ix_schedule_file_schedule_id_uri", "schedule_id", "uri"),
)
