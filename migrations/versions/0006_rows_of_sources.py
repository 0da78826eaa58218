"""sources that hold rows of the input in another order"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("source", sa.Column("rows_bm", sa.LargeBinary(), nullable=True))


def downgrade() -> None:
    op.drop_column("source", "rows_bm")
