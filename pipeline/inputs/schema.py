"""One schema for many files: types are widened where every value is held, and clashes name the files.

With it, what the files' own key-value metadata says of an output.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from pipeline.inputs.type_promotion import NoCommonType, RangeOf, common_type
from pipeline.spec import json_text
from storage.errors import InvalidInput
from storage.parquet.arrow_schemas import unordered

Metadata = Mapping[Any, Any]
"""bytes → bytes; pyarrow's type stubs want it wider."""

_OF_ALL_COLUMNS = (
    b"ARROW:schema", b"pandas", b"huggingface", b"org.apache.spark.", b"iceberg.", b"parquet.avro.schema", b"avro.",
    b"parquet.proto.", b"writer.", b"delta.",
)  # fmt: skip
"""Begins of keys whose values describe the whole table, which an output, with its result columns, no longer is."""

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


def agreed(files: Collection[Metadata | None]) -> dict[Any, Any]:
    """What every file says, in the same words."""
    first, *others = [dict(found or {}) for found in files] or [{}]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def carried(metadata: Metadata | None, keep: Collection[str]) -> dict[Any, Any]:
    """What of the inputs' metadata is true of an output that keeps these columns.

    GeoParquet's ``geo`` goes along when every geometry column that it describes does.
    """
    found = {key: value for key, value in (metadata or {}).items() if not key.startswith(_OF_ALL_COLUMNS)}
    if b"geo" in found and not _geometries(found[b"geo"]) <= set(keep):
        del found[b"geo"]
    return found


def _geometries(geo: bytes) -> set[str]:
    try:
        return set(json_text.loads(geo)["columns"])
    except (ValueError, KeyError, TypeError):
        return set()
