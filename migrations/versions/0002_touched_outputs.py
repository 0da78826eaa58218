"""touched outputs: those that a late finalizer may have disturbed"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TOUCHED = sa.text("touched")


def upgrade() -> None:
    op.add_column("job", sa.Column("touched", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.create_index("ix_job_touched", "job", ["id"], sqlite_where=_TOUCHED, postgresql_where=_TOUCHED)


def downgrade() -> None:
    op.drop_index("ix_job_touched", table_name="job", sqlite_where=_TOUCHED, postgresql_where=_TOUCHED)
    op.drop_column("job", "touched")
