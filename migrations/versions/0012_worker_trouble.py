"""what keeps a worker from getting work, and the messages it has dropped"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("worker", sa.Column("trouble", sa.Text(), nullable=True))
    op.add_column("worker", sa.Column("dropped_messages", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("worker", "dropped_messages")
    op.drop_column("worker", "trouble")
