"""Column types that take any text: what cannot be stored is written as an escape, the same on every database."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

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


class Json(sa.TypeDecorator[Any]):
    """JSON, made :func:`storable_json` on its way in: JSONB on PostgreSQL."""

    impl = sa.JSON
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name != "postgresql":
            return super().load_dialect_impl(dialect)
        from sqlalchemy.dialects.postgresql import JSONB  # embedded databases start without it

        return dialect.type_descriptor(JSONB())

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return storable_json(value)
