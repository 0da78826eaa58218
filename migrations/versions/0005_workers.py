"""workers say what they do, and can be asked to drain"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")
_COLUMNS = ("engines", "queues", "slots", "lease_seconds", "version", "draining", "warm")


def upgrade() -> None:
    with op.batch_alter_table("worker", schema=None) as batch_op:
        batch_op.add_column(sa.Column("engines", _JSON, server_default="[]", nullable=False))
        batch_op.add_column(sa.Column("queues", _JSON, server_default="[]", nullable=False))
        batch_op.add_column(sa.Column("slots", sa.Integer(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("lease_seconds", sa.Double(), server_default="60", nullable=False))
        batch_op.add_column(sa.Column("version", sa.Text(), server_default="unknown", nullable=False))
        batch_op.add_column(sa.Column("draining", sa.Boolean(), server_default=sa.text("false"), nullable=False))
        batch_op.add_column(sa.Column("warm", _JSON, server_default="[]", nullable=False))


def downgrade() -> None:
    with op.batch_alter_table("worker", schema=None) as batch_op:
        for name in reversed(_COLUMNS):
            batch_op.drop_column(name)
