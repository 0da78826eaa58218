"""registered models"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

_ID = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JSON = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")
_ACTIVE = sa.text("state = 'active'")


def upgrade() -> None:
    op.create_table(
        "model",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant", _ID, nullable=False),
        sa.Column("name", _ID, nullable=False),
        sa.Column("last_number", sa.Integer(), server_default="0", nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model")),
        sa.UniqueConstraint("tenant", "name", name=op.f("uq_model_tenant_name")),
    )
    op.create_table(
        "model_revision",
        sa.Column("id", _ID, nullable=False),
        sa.Column("model_id", _ID, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("digest", _ID, nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint(
            "state IN ('draft', 'validated', 'active', 'retired')", name=op.f("ck_model_revision_state")
        ),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name=op.f("fk_model_revision_model_id_model")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_revision")),
        sa.UniqueConstraint("model_id", "number", name=op.f("uq_model_revision_model_id_number")),
        sa.UniqueConstraint("model_id", "digest", name=op.f("uq_model_revision_model_id_digest")),
    )
    op.create_index(
        "uq_model_revision_active",
        "model_revision",
        ["model_id"],
        unique=True,
        sqlite_where=_ACTIVE,
        postgresql_where=_ACTIVE,
    )
    op.create_table(
        "model_artifact",
        sa.Column("revision_id", _ID, nullable=False),
        sa.Column("name", _ID, nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        sa.Column("n_bytes", _BIG, nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["revision_id"],
            ["model_revision.id"],
            name=op.f("fk_model_artifact_revision_id_model_revision"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("revision_id", "name", name=op.f("pk_model_artifact")),
    )
    op.create_table(
        "model_alias",
        sa.Column("model_id", _ID, nullable=False),
        sa.Column("alias", _ID, nullable=False),
        sa.Column("revision_id", _ID, nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name=op.f("fk_model_alias_model_id_model")),
        sa.ForeignKeyConstraint(
            ["revision_id"],
            ["model_revision.id"],
            name=op.f("fk_model_alias_revision_id_model_revision"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("model_id", "alias", name=op.f("pk_model_alias")),
    )
    op.create_index("ix_model_alias_revision_id", "model_alias", ["revision_id"])
    op.create_table(
        "model_report",
        sa.Column("id", _ID, nullable=False),
        sa.Column("revision_id", _ID, nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("document", _JSON, nullable=False),
        sa.CheckConstraint("verdict IN ('PASS', 'FAIL', 'INSUFFICIENT')", name=op.f("ck_model_report_verdict")),
        sa.ForeignKeyConstraint(
            ["revision_id"],
            ["model_revision.id"],
            name=op.f("fk_model_report_revision_id_model_revision"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_report")),
    )
    op.create_index("ix_model_report_revision_id", "model_report", ["revision_id"])
    op.create_table(
        "model_event",
        sa.Column("id", _BIG, nullable=False),
        sa.Column("model_id", _ID, nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=True),
        sa.Column("digest", sa.Text(), nullable=True),
        sa.Column("alias", sa.Text(), nullable=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("from_state", sa.Text(), nullable=True),
        sa.Column("to_state", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("forced", sa.Boolean(), server_default=sa.text("(false)"), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name=op.f("fk_model_event_model_id_model")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_event")),
    )
    op.create_index("ix_model_event_model_id", "model_event", ["model_id"])
    op.add_column("job", sa.Column("model", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("job", "model")
    op.drop_table("model_event")
    op.drop_table("model_report")
    op.drop_table("model_alias")
    op.drop_table("model_artifact")
    op.drop_table("model_revision")
    op.drop_table("model")
