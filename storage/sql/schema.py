"""What all tables share: the naming of constraints, and column types."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
ExactJson = sa.JSON()
"""Read back as it was given. JSONB would sort the keys (a JSON Schema's properties are answered in their order) and
refuses a NUL (a column's name may hold one)."""
Seconds: sa.Double[float] = sa.Double()
