"""One schema for many files: types are widened where every value is held, and clashes name the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from pipeline.inputs.parquet_metadata import agreed
from pipeline.inputs.type_promotion import NoCommonType, RangeOf, common_type
from storage.errors import InvalidInput
from storage.parquet.arrow_schemas import unordered

_FIELD_ID = b"PARQUET:field_id"
_NAMED = 2
"""Types that a message names before the last one."""


class UnifiedSchema:
    """Grows file by file. Columns keep the order in which they first appear; all of them may be null."""

    def __init__(self) -> None:
        self._fields: dict[str, pa.Field[Any]] = {}
        self._kinds: dict[str, dict[pa.DataType, str]] = {}
        """By column: each type that it has somewhere, and the first file where it has it."""
        self._orders: dict[str, list[Any]] = {}
        self._seen: set[pa.Schema] = set()
        self._metadata: dict[Any, Any] | None = None
        self.twice: dict[str, str] = {}
        """Which file has several columns of a name, by that name: such a column cannot be read."""
        self.clashes: dict[str, str] = {}
        """What :meth:`resolved` has found: by column, why no type holds its values in all files."""

    def resolved(self, range_of: RangeOf) -> pa.Schema:
        """One schema for all files. ``range_of`` is asked where types alone do not tell whether one holds all values.

        A column without a common type is in ``clashes`` then, and has its first type here: it cannot be read.
        """
        return pa.schema([field.with_type(self._resolved(field.name, range_of)) for field in self._fields.values()])

    def _resolved(self, name: str, range_of: RangeOf) -> pa.DataType:
        kinds = self._kinds[name]
        if name in self.twice:
            return next(iter(kinds))
        try:
            kind = common_type(kinds, range_of, (name,))
        except (NoCommonType, InvalidInput) as reason:
            *others, (last, where) = [(kind, origin) for kind, origin in kinds.items() if not pa.types.is_null(kind)]
            self.clashes[name] = (
                f"column {name!r} is {', '.join(f'{kind} in {origin}' for kind, origin in others[:_NAMED])} and {last} "
                f"in {where}; the files of one job need types that go together: {reason}"
            )
            return next(iter(kinds))
        # Where the files disagree, no order of the categories holds for all.
        return unordered(kind) if len(self._orders.get(name, ())) > 1 else kind

    @property
    def metadata(self) -> dict[Any, Any]:
        """What every file's own key-value metadata says, in the same words."""
        return self._metadata or {}

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def add(self, schema: pa.Schema, origin: str, orders: Mapping[str, Sequence[Any]] = MappingProxyType({})) -> None:
        """Take in the schema of file ``origin``, and the orders of its ordered categories by column.

        A name that two columns have is in ``twice`` then.
        """
        for name, found in orders.items():
            known = self._orders.setdefault(name, [])
            known += (order for order in found if order not in known)
        said: Any = schema.metadata
        self._metadata = agreed([said if self._metadata is None else self._metadata, said])
        if schema in self._seen:
            return
        self.twice.update({name: origin for name in schema.names if schema.names.count(name) > 1})
        for field in schema:
            if field.name not in self._fields:
                metadata: dict[Any, Any] = {k: v for k, v in (field.metadata or {}).items() if k != _FIELD_ID}
                self._fields[field.name] = field.with_nullable(True).with_metadata(metadata)
            self._kinds.setdefault(field.name, {}).setdefault(field.type, origin)
        self._seen.add(schema)
