"""Column types. Text and JSON take any text: what cannot be stored is written as an escape, alike on every database.

Bitmaps, states and slices are read as what they are, so that no query packs or unpacks them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from pyroaring import BitMap
from sqlalchemy.dialects.postgresql import JSONB

from storage.records import Slice
from storage.storable import storable, storable_json


class Text(sa.TypeDecorator[str]):
    """Text, made :func:`storable` on its way in, also where a query compares with it."""

    impl: Any = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return storable(value) if isinstance(value, str) else value


class Id(Text):
    """Text that sorts by bytes, so that the claim's order does not depend on the locale of the database."""

    impl = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    cache_ok = True


class State(Text):
    """A member of a ``StrEnum``. Raises ``ValueError`` for any other text."""

    cache_ok = True

    def __init__(self, kind: type[StrEnum]) -> None:
        super().__init__()
        self.kind = kind

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else self.kind(value).value

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> StrEnum | None:
        return None if value is None else self.kind(value)


class Rows(sa.TypeDecorator[BitMap]):
    """Row numbers, stored as a serialised Roaring bitmap. NULL is read as ``None``, or as no rows (``or_empty``)."""

    impl = sa.LargeBinary
    cache_ok = True

    def __init__(self, *, or_empty: bool = False) -> None:
        super().__init__()
        self.or_empty = or_empty

    def process_bind_param(self, value: BitMap | None, dialect: sa.Dialect) -> bytes | None:
        if value is None:
            return None
        value.run_optimize()
        return value.serialize()

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> BitMap | None:
        if value is None:
            return BitMap() if self.or_empty else None
        return BitMap.deserialize(value)


class Json(sa.TypeDecorator[Any]):
    """JSON, made :func:`storable_json` on its way in: JSONB on PostgreSQL."""

    impl = sa.JSON().with_variant(JSONB(), "postgresql")
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return storable_json(value)


class Slices(Json):
    """A tuple of :class:`Slice`, as a JSON list of lists."""

    cache_ok = True

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> tuple[Slice, ...] | None:
        return None if value is None else tuple(Slice(*item) for item in value)
