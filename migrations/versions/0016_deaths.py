"""which rows are inside an engine alone, and which were given up: so that a death can be judged"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempt", sa.Column("n_poison", sa.Integer(), server_default="0", nullable=False))
    op.add_column("attempt", sa.Column("alone_bm", sa.LargeBinary()))


def downgrade() -> None:
    op.drop_column("attempt", "alone_bm")
    op.drop_column("attempt", "n_poison")
