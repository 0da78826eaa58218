"""jobs that are being deleted; files taken by jobs that are gone"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_DELETED = sa.text("deleted_at IS NOT NULL")
_FK = "fk_schedule_file_job_id_job"


def upgrade() -> None:
    op.add_column("job", sa.Column("deleted_at", sa.Double(), nullable=True))
    op.add_column("job", sa.Column("overtaken", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.create_index("ix_job_deleted_at", "job", ["deleted_at"], sqlite_where=_DELETED, postgresql_where=_DELETED)
    with op.batch_alter_table("schedule_file", schema=None) as batch_op:
        batch_op.drop_constraint(_FK, type_="foreignkey")


def downgrade() -> None:
    op.execute("DELETE FROM job WHERE deleted_at IS NOT NULL")
    op.execute("DELETE FROM schedule_file WHERE job_id NOT IN (SELECT id FROM job)")
    with op.batch_alter_table("schedule_file", schema=None) as batch_op:
        batch_op.create_foreign_key(_FK, "job", ["job_id"], ["id"], ondelete="CASCADE")
    op.drop_index("ix_job_deleted_at", table_name="job")
    op.drop_column("job", "overtaken")
    op.drop_column("job", "deleted_at")
