"""the last tick, and garbage that cannot be deleted"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tick",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_tick")),
    )
    op.add_column("gc_queue", sa.Column("n_fail", sa.Integer(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("gc_queue", "n_fail")
    op.drop_table("tick")
