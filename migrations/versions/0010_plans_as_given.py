"""plans and hive values are read back as they were given"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _to(sa.JSON(), "json")


def downgrade() -> None:
    _to(JSONB(), "jsonb")


def _to(kind: sa.types.TypeEngine[object], name: str) -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, column in (("job", "plan"), ("source", "partition")):
        op.alter_column(table, column, type_=kind, existing_nullable=False, postgresql_using=f'"{column}"::{name}')
