"""shares by queue and priority; files taken for good; what tells a worker's process from a later one"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_FAILING = sa.text("state <> 'committed' AND n_failed > 0")


def upgrade() -> None:
    op.create_table(
        "tenant_share",
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("vtime", sa.Double(), nullable=False),
        sa.Column("vstart", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("queue", "priority", "tenant", name=op.f("pk_tenant_share")),
        postgresql_with={"fillfactor": "70"},
    )
    # Whoever owes for rows it was given goes on owing, wherever it waits.
    op.execute(
        "INSERT INTO tenant_share (queue, priority, tenant, vtime, vstart) "
        "SELECT DISTINCT job.queue, job.priority, tenant.name, tenant.vtime, tenant.vstart "
        "FROM job JOIN tenant ON tenant.name = job.tenant WHERE tenant.vtime > 0 "
        "AND job.state NOT IN ('cancelled', 'completed', 'expired', 'failed')"
    )
    op.drop_column("tenant", "vtime")
    op.drop_column("tenant", "vstart")
    op.create_index(
        "ix_shard_failing", "shard", ["job_id", "n_failed"], sqlite_where=_FAILING, postgresql_where=_FAILING
    )
    op.add_column("schedule_file", sa.Column("done_at", sa.Double(), nullable=True))
    op.execute(
        "UPDATE schedule_file SET done_at = (SELECT min(event.at) FROM event "
        "WHERE event.job_id = schedule_file.job_id AND event.type = 'job.completed')"
    )
    op.add_column("worker", sa.Column("boot_id", sa.Text(), nullable=True))
    op.add_column("worker", sa.Column("start_ticks", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True))


def downgrade() -> None:
    op.drop_column("worker", "start_ticks")
    op.drop_column("worker", "boot_id")
    op.drop_column("schedule_file", "done_at")
    op.drop_index("ix_shard_failing", table_name="shard")
    for name in ("vtime", "vstart"):
        op.add_column("tenant", sa.Column(name, sa.Double(), server_default="0", nullable=False))
        op.execute(
            f"UPDATE tenant SET {name} = coalesce("  # noqa: S608 - a name from the line above
            f"(SELECT max({name}) FROM tenant_share WHERE tenant_share.tenant = tenant.name), 0)"
        )
    op.drop_table("tenant_share")
