"""schedules"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_ID = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_PENDING = sa.text("state = 'pending'")


def upgrade() -> None:
    op.create_table(
        "schedule",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", _ID, nullable=False),
        sa.Column("cron", sa.Text(), nullable=False),
        sa.Column("tz", sa.Text(), nullable=False),
        sa.Column(
            "spec", sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"), nullable=False
        ),
        sa.Column("overlap", sa.Text(), nullable=False),
        sa.Column("misfire", sa.Text(), nullable=False),
        sa.Column("misfire_grace", sa.Double(), nullable=True),
        sa.Column("incremental", sa.Boolean(), nullable=False),
        sa.Column("paused", sa.Boolean(), server_default=sa.text("(false)"), nullable=False),
        sa.Column("next_at", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedule")),
        sa.UniqueConstraint("tenant", "name", name=op.f("uq_schedule_tenant_name")),
    )
    op.create_table(
        "schedule_fire",
        sa.Column("schedule_id", _ID, nullable=False),
        sa.Column("fire_at", sa.Double(), autoincrement=False, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("job_id", _ID, nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("missed", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False),
        sa.Column("decided_at", sa.Double(), nullable=False),
        sa.Column("settled_at", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "state IN ('pending', 'submitted', 'skipped', 'empty', 'failed')", name=op.f("ck_schedule_fire_state")
        ),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_schedule_fire_job_id_job"), ondelete="SET NULL"),
        sa.ForeignKeyConstraint(
            ["schedule_id"], ["schedule.id"], name=op.f("fk_schedule_fire_schedule_id_schedule"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("schedule_id", "fire_at", name=op.f("pk_schedule_fire")),
    )
    op.create_index("ix_schedule_fire_job_id", "schedule_fire", ["job_id"])
    op.create_index(
        "ix_schedule_fire_pending", "schedule_fire", ["fire_at"], sqlite_where=_PENDING, postgresql_where=_PENDING
    )
    op.create_table(
        "schedule_file",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("uri", _ID, nullable=False),
        sa.Column("schedule_id", _ID, nullable=False),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_schedule_file_job_id_job"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["schedule_id"], ["schedule.id"], name=op.f("fk_schedule_file_schedule_id_schedule"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "uri", name=op.f("pk_schedule_file")),
    )
    op.create_index("ix_schedule_file_schedule_id_uri", "schedule_file", ["schedule_id", "uri"])


def downgrade() -> None:
    op.drop_table("schedule_file")
    op.drop_table("schedule_fire")
    op.drop_table("schedule")
