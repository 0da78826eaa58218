"""what an attempt is at"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempt", sa.Column("step", sa.Text(), server_default="loading", nullable=False))


def downgrade() -> None:
    op.drop_column("attempt", "step")
