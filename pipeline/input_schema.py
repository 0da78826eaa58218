"""One schema for many files: types are widened where nothing is lost in kind, and clashes name both files."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.file_metadata import agreed
from storage.errors import InvalidInput

_FIELD_ID = b"PARQUET:field_id"


def merged_type(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """The narrowest type that holds both. Raises ``pa.ArrowTypeError`` or ``pa.ArrowInvalid`` when there is none."""
    if first == second:
        return first
    pair = [pa.schema([pa.field("column", kind)]) for kind in (first, second)]
    try:
        merged: pa.DataType = pa.unify_schemas(pair, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        plain = _decoded(first), _decoded(second)
        if plain == (first, second):
            raise
        return merged_type(*plain)
    return merged


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


class UnifiedSchema:
    """Grows file by file. Columns keep the order in which they first appear; all of them may be null."""

    def __init__(self) -> None:
        self._fields: dict[str, pa.Field[Any]] = {}
        self._origins: dict[str, str] = {}
        self._seen: set[pa.Schema] = set()
        self._metadata: dict[Any, Any] | None = None
        self.twice: dict[str, str] = {}
        """Which file has several columns of a name, by that name: such a column cannot be read."""

    @property
    def schema(self) -> pa.Schema:
        return pa.schema(self._fields.values())

    @property
    def metadata(self) -> dict[Any, Any]:
        """What every file's own key-value metadata says, in the same words."""
        return self._metadata or {}

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def add(self, schema: pa.Schema, origin: str) -> None:
        """Take in the schema of file ``origin``. Raises :class:`InvalidInput` when it does not go with the others."""
        said: Any = schema.metadata
        self._metadata = agreed([said if self._metadata is None else self._metadata, said])
        if schema in self._seen:
            return
        self.twice.update({name: origin for name in schema.names if schema.names.count(name) > 1})
        for field in schema:
            known = self._fields.get(field.name)
            if known is None:
                metadata: dict[Any, Any] = {k: v for k, v in (field.metadata or {}).items() if k != _FIELD_ID}
                self._fields[field.name] = field.with_nullable(True).with_metadata(metadata)
                self._origins[field.name] = origin
            elif field.name not in self.twice and known.type != field.type:
                self._fields[field.name] = known.with_type(self._merged(known, field, origin))
        self._seen.add(schema)

    def _merged(self, known: pa.Field[Any], field: pa.Field[Any], origin: str) -> pa.DataType:
        try:
            return merged_type(known.type, field.type)
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            raise InvalidInput(
                f"column {field.name!r} is {known.type} in {self._origins[field.name]} and {field.type} in {origin}; "
                "the files of one job need types that go together",
                field="input",
            ) from None
