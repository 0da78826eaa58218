"""Table rows as records, and records as values to store. Columns are called like the fields of their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    R = TypeVar("R", bound=DataclassInstance)


def read(kind: type[R], row: sa.Row[Any], **more: Any) -> R:
    """The row as a dataclass of this kind; ``more`` are the fields that are no columns.

    A field whose metadata names ``columns`` is a mapping of these.
    """
    found = more
    for field in fields(kind):
        if (columns := field.metadata.get("columns")) is not None:
            found[field.name] = {name: getattr(row, name) for name in columns}
        elif field.name not in more:
            found[field.name] = getattr(row, field.name)
    return kind(**found)


def values(item: DataclassInstance) -> dict[str, Any]:
    """The fields of a record, by column."""
    return {field.name: getattr(item, field.name) for field in fields(item)}


def insert(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert the rows (column → value), at least one. Raises ``ValueError`` for a name that is no column, which
    SQLAlchemy leaves out without a word where it gets several rows."""
    if unknown := set().union(*rows) - set(table.c.keys()):
        raise ValueError(f"table {table.name!r} has no column {', '.join(sorted(unknown))}")
    connection.execute(table.insert(), rows)
