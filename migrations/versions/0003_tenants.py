"""tenants: fair shares, caps and quotas; the engine of a shard"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_READY = sa.text("state = 'ready'")
_RUNNING = sa.text("state = 'running'")
_LIVE_JOB = sa.text("state NOT IN ('cancelled', 'completed', 'expired', 'failed')")


def _partial(where: sa.TextClause) -> dict[str, Any]:
    return {"sqlite_where": where, "postgresql_where": where}


def upgrade() -> None:

    big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "tenant",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("weight", sa.Double(), server_default="1", nullable=False),
        sa.Column("max_running", sa.Integer(), nullable=True),
        sa.Column("max_jobs", sa.Integer(), nullable=True),
        sa.Column("rows_per_day", big, nullable=True),
        sa.Column("tokens_per_day", big, nullable=True),
        sa.Column("vtime", sa.Double(), server_default="0", nullable=False),
        sa.Column("vstart", sa.Double(), server_default="0", nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("weight > 0", name=op.f("ck_tenant_weight")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_tenant")),
        postgresql_with={"fillfactor": "70"},
    )
    op.create_table(
        "tenant_usage",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("day", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("rows", big, server_default="0", nullable=False),
        sa.Column("tokens", big, server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("tenant", "day", name=op.f("pk_tenant_usage")),
        postgresql_with={"fillfactor": "70"},
    )
    op.execute("INSERT INTO tenant (name, created_at) SELECT tenant, min(created_at) FROM job GROUP BY tenant")
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.create_index("ix_job_live_tenant", ["tenant"], unique=False, **_partial(_LIVE_JOB))
    # No batch: that would copy the table on SQLite, and lose rows that refer to it by ON DELETE CASCADE.
    key = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.add_column("shard", sa.Column("engine_key", key, server_default=sa.text("''"), nullable=False))
    op.execute("UPDATE shard SET engine_key = (SELECT engine_key FROM job WHERE job.id = shard.job_id)")
    op.drop_index("ix_shard_ready", table_name="shard")
    op.create_index(
        "ix_shard_ready",
        "shard",
        ["queue", "priority", "tenant", "engine_key", "run_after", "id"],
        unique=False,
        **_partial(_READY),
    )
    op.drop_index("ix_shard_running", table_name="shard")
    op.create_index("ix_shard_running", "shard", ["tenant", "id"], unique=False, **_partial(_RUNNING))


def downgrade() -> None:

    op.drop_index("ix_shard_running", table_name="shard")
    op.create_index("ix_shard_running", "shard", ["id"], unique=False, **_partial(_RUNNING))
    op.drop_index("ix_shard_ready", table_name="shard")
    op.create_index(
        "ix_shard_ready",
        "shard",
        ["queue", sa.literal_column("priority DESC"), "run_after", "id"],
        unique=False,
        **_partial(_READY),
    )
    op.drop_column("shard", "engine_key")
    op.drop_index("ix_job_live_tenant", table_name="job")
    op.drop_table("tenant_usage")
    op.drop_table("tenant")
