"""how often a process died while it planned or published a job"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("n_lost", sa.Integer(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("job", "n_lost")
