"""what a worker's machine has that jobs may ask for"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    json = sa.JSON().with_variant(JSONB(), "postgresql")
    op.add_column("worker", sa.Column("offers", json, nullable=False, server_default="{}"))


def downgrade() -> None:
    op.drop_column("worker", "offers")
