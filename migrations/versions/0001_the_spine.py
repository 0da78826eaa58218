"""the spine"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:

    op.create_table(
        "job",
        sa.Column("id", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("engine_key", sa.Text(), nullable=False),
        sa.Column(
            "spec", sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"), nullable=False
        ),
        sa.Column("spec_hash", sa.Text(), nullable=False),
        sa.Column("idem_key", sa.Text(), nullable=True),
        sa.Column(
            "plan",
            sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"),
            server_default="{}",
            nullable=False,
        ),
        sa.Column("output_uri", sa.Text(), nullable=False),
        sa.Column("stop_reason", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("gen", sa.Integer(), server_default="0", nullable=False),
        sa.Column("n_shards", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False),
        sa.Column("n_open", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False),
        sa.Column("n_dead", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False),
        sa.Column(
            "rows_total", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False
        ),
        sa.Column(
            "rows_done", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False
        ),
        sa.Column(
            "rows_failed", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False
        ),
        sa.Column(
            "prompt_tokens", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False
        ),
        sa.Column(
            "cached_tokens", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False
        ),
        sa.Column(
            "completion_tokens",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            server_default="0",
            nullable=False,
        ),
        sa.Column("max_failed_rows", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("finalize_epoch", sa.Integer(), server_default="0", nullable=False),
        sa.Column("publishing", sa.Boolean(), server_default=sa.text("(false)"), nullable=False),
        sa.Column("finalize_owner", sa.Text(), nullable=True),
        sa.Column("finalize_until", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("cancel_requested_at", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "state IN ('validating', 'queued', 'in_progress', 'finalizing', 'cancelling', 'completed', 'failed', 'cancelled', 'expired')",
            name=op.f("ck_job_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job")),
    )
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.create_index(
            "ix_job_live_state",
            ["state"],
            unique=False,
            sqlite_where=sa.text("state NOT IN ('cancelled', 'completed', 'expired', 'failed')"),
            postgresql_where=sa.text("state NOT IN ('cancelled', 'completed', 'expired', 'failed')"),
        )
        batch_op.create_index("ix_job_output_uri", ["output_uri"], unique=False)
        batch_op.create_index(
            "uq_job_live_output",
            ["output_uri"],
            unique=True,
            sqlite_where=sa.text("state NOT IN ('cancelled', 'completed', 'expired', 'failed')"),
            postgresql_where=sa.text("state NOT IN ('cancelled', 'completed', 'expired', 'failed')"),
        )
        batch_op.create_index("uq_job_tenant_idem_key", ["tenant", "idem_key"], unique=True)

    op.create_table(
        "worker",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("pid_started_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("heartbeat_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_worker")),
    )
    op.create_table(
        "event",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("job_id", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("shard_id", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("attempt_no", sa.Integer(), nullable=True),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column(
            "data",
            sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"),
            server_default="{}",
            nullable=False,
        ),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_event_job_id_job"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event")),
    )
    with op.batch_alter_table("event", schema=None) as batch_op:
        batch_op.create_index("ix_event_job_id_id", ["job_id", "id"], unique=False)

    op.create_table(
        "gc_queue",
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_gc_queue_job_id_job"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("uri", name=op.f("pk_gc_queue")),
    )
    with op.batch_alter_table("gc_queue", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_gc_queue_job_id"), ["job_id"], unique=False)

    op.create_table(
        "shard",
        sa.Column("id", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("job_id", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("gen", sa.Integer(), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("row_start", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("row_n", sa.Integer(), nullable=False),
        sa.Column(
            "slices", sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"), nullable=False
        ),
        sa.Column("select_bm", sa.LargeBinary(), nullable=True),
        sa.Column("done_bm", sa.LargeBinary(), nullable=True),
        sa.Column("failed_bm", sa.LargeBinary(), nullable=True),
        sa.Column("n_done", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False),
        sa.Column("n_failed", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False),
        sa.Column("run_after", sa.Double(), server_default="0", nullable=False),
        sa.Column("attempt_no", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("committed_attempt", sa.Integer(), nullable=True),
        sa.Column("n_fail", sa.Integer(), server_default="0", nullable=False),
        sa.Column("n_lost", sa.Integer(), server_default="0", nullable=False),
        sa.Column("n_crash", sa.Integer(), server_default="0", nullable=False),
        sa.Column("suspect_bm", sa.LargeBinary(), nullable=True),
        sa.Column(
            "prompt_tokens", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False
        ),
        sa.Column(
            "cached_tokens", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False
        ),
        sa.Column(
            "completion_tokens",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            server_default="0",
            nullable=False,
        ),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "state <> 'running' OR (lease_owner IS NOT NULL AND lease_until IS NOT NULL)", name=op.f("ck_shard_leased")
        ),
        sa.CheckConstraint(
            "state IN ('ready', 'running', 'committed', 'failed', 'cancelled')", name=op.f("ck_shard_state")
        ),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_shard_job_id_job"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shard")),
        sa.UniqueConstraint("job_id", "gen", "idx", name=op.f("uq_shard_job_id_gen_idx")),
        postgresql_with={"fillfactor": "70"},
    )
    with op.batch_alter_table("shard", schema=None) as batch_op:
        batch_op.create_index(
            "ix_shard_ready",
            ["queue", sa.literal_column("priority DESC"), "run_after", "id"],
            unique=False,
            sqlite_where=sa.text("state = 'ready'"),
            postgresql_where=sa.text("state = 'ready'"),
        )
        batch_op.create_index(
            "ix_shard_ready_of_job",
            ["job_id", sa.literal_column("priority DESC"), "run_after", "id"],
            unique=False,
            sqlite_where=sa.text("state = 'ready'"),
            postgresql_where=sa.text("state = 'ready'"),
        )
        batch_op.create_index(
            "ix_shard_running",
            ["id"],
            unique=False,
            sqlite_where=sa.text("state = 'running'"),
            postgresql_where=sa.text("state = 'running'"),
        )

    op.create_table(
        "source",
        sa.Column("job_id", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("idx", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.Column("n_bytes", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("n_rows", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column(
            "partition", sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"), nullable=False
        ),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_source_job_id_job"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "idx", name=op.f("pk_source")),
    )
    op.create_table(
        "attempt",
        sa.Column("shard_id", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("attempt_no", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column(
            "rows_resumed", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False
        ),
        sa.Column(
            "rows_computed", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False
        ),
        sa.Column(
            "stats",
            sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"),
            server_default="{}",
            nullable=False,
        ),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["shard_id"], ["shard.id"], name=op.f("fk_attempt_shard_id_shard"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("shard_id", "attempt_no", name=op.f("pk_attempt")),
    )
    op.create_table(
        "part_file",
        sa.Column("shard_id", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("attempt_no", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("n_bytes", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.Column("rows_bm", sa.LargeBinary(), nullable=False),
        sa.Column("failed_bm", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["shard_id"], ["shard.id"], name=op.f("fk_part_file_shard_id_shard"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("shard_id", "attempt_no", "seq", name=op.f("pk_part_file")),
    )
    op.create_table(
        "row_exception",
        sa.Column("shard_id", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("row_idx", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["shard_id"], ["shard.id"], name=op.f("fk_row_exception_shard_id_shard"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("shard_id", "row_idx", name=op.f("pk_row_exception")),
    )


def downgrade() -> None:

    op.drop_table("row_exception")
    op.drop_table("part_file")
    op.drop_table("attempt")
    op.drop_table("source")
    with op.batch_alter_table("shard", schema=None) as batch_op:
        batch_op.drop_index(
            "ix_shard_running", sqlite_where=sa.text("state = 'running'"), postgresql_where=sa.text("state = 'running'")
        )
        batch_op.drop_index(
            "ix_shard_ready_of_job",
            sqlite_where=sa.text("state = 'ready'"),
            postgresql_where=sa.text("state = 'ready'"),
        )
        batch_op.drop_index(
            "ix_shard_ready", sqlite_where=sa.text("state = 'ready'"), postgresql_where=sa.text("state = 'ready'")
        )

    op.drop_table("shard")
    with op.batch_alter_table("gc_queue", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_gc_queue_job_id"))

    op.drop_table("gc_queue")
    with op.batch_alter_table("event", schema=None) as batch_op:
        batch_op.drop_index("ix_event_job_id_id")

    op.drop_table("event")
    op.drop_table("worker")
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_index("uq_job_tenant_idem_key")
        batch_op.drop_index(
            "uq_job_live_output",
            sqlite_where=sa.text("state NOT IN ('cancelled', 'completed', 'expired', 'failed')"),
            postgresql_where=sa.text("state NOT IN ('cancelled', 'completed', 'expired', 'failed')"),
        )
        batch_op.drop_index("ix_job_output_uri")
        batch_op.drop_index(
            "ix_job_live_state",
            sqlite_where=sa.text("state NOT IN ('cancelled', 'completed', 'expired', 'failed')"),
            postgresql_where=sa.text("state NOT IN ('cancelled', 'completed', 'expired', 'failed')"),
        )

    op.drop_table("job")
