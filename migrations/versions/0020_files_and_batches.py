"""files and batches of the gateway"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

_ID = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JSON = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")
_STATES = ("validating", "in_progress", "finalizing", "cancelling", "completed", "failed", "cancelled", "expired")
_LIVE = sa.text("state NOT IN ('cancelled', 'completed', 'expired', 'failed')")
_TIMES = ("in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled", "expired")
_COUNTS = ("n_total", "n_completed", "n_failed", "input_tokens", "cached_tokens", "output_tokens")


def upgrade() -> None:
    op.create_table(
        "file",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant", _ID, nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("n_bytes", _BIG, server_default="0", nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("stored_at", sa.Double(), nullable=True),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("deleted_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_file")),
    )
    op.create_index("ix_file_tenant_created_at_id", "file", ["tenant", "created_at", "id"])
    op.create_index("ix_file_expires_at", "file", ["expires_at"])
    op.create_table(
        "batch",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant", _ID, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("input_file_id", sa.Text(), nullable=False),
        sa.Column("completion_window", sa.Text(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=True),
        sa.Column("output_seconds", sa.Double(), nullable=True),
        sa.Column("idem_key", _ID, nullable=True),
        sa.Column("body_hash", _ID, nullable=False),
        sa.Column("key_id", _ID, nullable=True),
        sa.Column("job_id", _ID, nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("errors", _JSON, nullable=True),
        *(sa.Column(name, _BIG, server_default="0", nullable=False) for name in _COUNTS),
        sa.Column("output_file_id", _ID, nullable=True),
        sa.Column("error_file_id", _ID, nullable=True),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        *(sa.Column(f"{name}_at", sa.Double(), nullable=True) for name in _TIMES),
        sa.CheckConstraint(f"state IN ({', '.join(map(repr, _STATES))})", name=op.f("ck_batch_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batch")),
    )
    op.create_index("uq_batch_tenant_idem_key", "batch", ["tenant", "idem_key"], unique=True)
    op.create_index("ix_batch_tenant_created_at_id", "batch", ["tenant", "created_at", "id"])
    op.create_index("ix_batch_tenant_body_hash", "batch", ["tenant", "body_hash"])
    op.create_index("ix_batch_live", "batch", ["id"], sqlite_where=_LIVE, postgresql_where=_LIVE)
    op.create_index("ix_batch_input_file_id", "batch", ["input_file_id"])


def downgrade() -> None:
    op.drop_table("batch")
    op.drop_table("file")
