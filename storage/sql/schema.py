"""What all tables share: the naming of constraints, column types, and conditions on states."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

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


def one_of(states: type[StrEnum]) -> sa.CheckConstraint:
    """The column ``state`` holds one of these."""
    return sa.CheckConstraint(f"state IN ({', '.join(repr(state.value) for state in states)})", name="state")


def none_of(states: Iterable[StrEnum]) -> sa.TextClause:
    """The column ``state`` holds none of these: the condition of a partial index."""
    return sa.text(f"state NOT IN ({', '.join(repr(state.value) for state in sorted(states))})")
