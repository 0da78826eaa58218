"""API keys, and what was done with them"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

_ID = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JSON = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")


def upgrade() -> None:
    op.create_table(
        "api_key",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant", _ID, nullable=False),
        sa.Column("prefix", _ID, nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("scopes", _JSON, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key")),
    )
    op.create_index(op.f("ix_api_key_prefix"), "api_key", ["prefix"])
    op.create_index("ix_api_key_tenant_id", "api_key", ["tenant", "id"])
    op.create_table(
        "api_key_event",
        sa.Column("id", _BIG, nullable=False),
        sa.Column("key_id", _ID, nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("data", _JSON, nullable=True),
        sa.ForeignKeyConstraint(["key_id"], ["api_key.id"], name=op.f("fk_api_key_event_key_id_api_key")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key_event")),
    )
    op.create_index(op.f("ix_api_key_event_key_id"), "api_key_event", ["key_id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_api_key_event_key_id"), table_name="api_key_event")
    op.drop_table("api_key_event")
    op.drop_index("ix_api_key_tenant_id", table_name="api_key")
    op.drop_index(op.f("ix_api_key_prefix"), table_name="api_key")
    op.drop_table("api_key")
