"""What a schema must keep to, so that Parquet can hold it and every reader gets it back; types inside of types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import InvalidInput

Path = tuple[str, ...]
"""Names of a column and of struct fields on the way down to a value; ``ITEM`` stands for items of a list, ``ENTRY`` and
``key`` or ``value`` for those of a map."""
ITEM, ENTRY = "[]", "{}"

MOST_LEVELS = 100
"""Of a Parquet schema, its root counted: what Arrow's reader takes by default. A list takes two, a struct one."""


_BYTES: dict[Any, Any] = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def check(schema: pa.Schema, where: str) -> None:
    """Refuse names that are not UTF-8 and types that are nested too deeply. ``where`` is the file, for messages.

    Raises :class:`InvalidInput`.
    """
    for at in range(len(schema)):
        name, kind = None, schema.field(at).type
        try:
            name = schema.field(at).name
            depth = 1 + levels(kind)
        except UnicodeDecodeError as error:
            inside = f"in column {name!r}" if name is not None else f"of column {at}"
            raise InvalidInput(
                f"{where}: the name {error.object[:80]!r} {inside} is not valid UTF-8; write it anew",
                field="input",
            ) from None
        if _in_view(kind):
            raise InvalidInput(
                f"{where}: column {name!r} has categories in a list view, of which Arrow converts none; write it with "
                "lists",
                field="input",
            )
        if depth > MOST_LEVELS:
            raise InvalidInput(
                f"{where}: column {name!r} is nested too deeply for Parquet ({depth} levels, of {MOST_LEVELS}); keep "
                "it as a string",
                field="input",
            )


def has_parquet_type(kind: pa.DataType) -> bool:
    """Whether a column of this type can be written to Parquet."""
    try:
        pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([pa.field("column", kind)])).close()
    except (pa.ArrowException, NotImplementedError):
        return False
    return True


def levels(kind: Any) -> int:
    """Levels of a column of this type in a Parquet schema. Raises ``UnicodeDecodeError`` for a name in it."""
    deepest, level = 0, [(kind, 0)]
    while level:
        below = []
        for item, above in level:
            if isinstance(item, pa.BaseExtensionType):
                below.append((item.storage_type, above))
                continue
            if isinstance(item, pa.DictionaryType):
                below.append((item.value_type, above))
                continue
            deepest = max(deepest, above + 1)
            for at in range(item.num_fields):
                field = item.field(at)
                _ = field.name
                below.append((field.type, above + (1 if isinstance(item, pa.StructType) else 2)))
        level = below
    return deepest


def _in_view(kind: Any) -> bool:
    """Whether there are dictionaries in a list view, at any depth."""
    if isinstance(kind, pa.BaseExtensionType) or not kind.num_fields:
        return False
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return bool(changed(kind, _plain) != kind)
    return any(_in_view(kind.field(at).type) for at in range(kind.num_fields))


def _plain(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def changed(kind: Any, change: Callable[[Any], Any]) -> Any:
    """The type with ``change`` applied to it and to every type in it, from the inside out; extension types stay."""
    if pa.types.is_struct(kind):
        kind = pa.struct([_changed_field(kind.field(at), change) for at in range(kind.num_fields)])
    elif pa.types.is_map(kind):
        kind = pa.map_(
            _changed_field(kind.key_field, change), _changed_field(kind.item_field, change), kind.keys_sorted
        )
    elif pa.types.is_fixed_size_list(kind):
        kind = pa.list_(_changed_field(kind.value_field, change), kind.list_size)
    elif pa.types.is_list(kind):
        kind = pa.list_(_changed_field(kind.value_field, change))
    elif pa.types.is_large_list(kind):
        kind = pa.large_list(_changed_field(kind.value_field, change))
    elif pa.types.is_list_view(kind):
        kind = pa.list_view(_changed_field(kind.value_field, change))
    elif pa.types.is_large_list_view(kind):
        kind = pa.large_list_view(_changed_field(kind.value_field, change))
    elif pa.types.is_dictionary(kind):
        kind = pa.dictionary(kind.index_type, changed(kind.value_type, change), kind.ordered)
    return change(kind)


def _changed_field(field: Any, change: Callable[[Any], Any]) -> Any:
    return field.with_type(changed(field.type, change))


def _changed_columns(schema: pa.Schema, change: Callable[[Any], Any]) -> pa.Schema:
    fields = [_changed_field(field, change) for field in schema]
    return pa.schema(fields, metadata=cast(Any, schema.metadata))


def with_wide_indices(schema: pa.Schema) -> pa.Schema:
    """The same columns with dictionaries of any size: an index of 8 bits is too narrow as soon as batches, files or row
    groups bring values of their own."""
    return _changed_columns(schema, _widened)


def _widened(kind: Any) -> Any:
    return pa.dictionary(pa.int32(), kind.value_type, kind.ordered) if pa.types.is_dictionary(kind) else kind


def as_stored(schema: pa.Schema) -> pa.Schema:
    """The same columns in the types in which Parquet gives them back."""
    return _changed_columns(schema, _stored)


def _stored(kind: Any) -> Any:
    if pa.types.is_date64(kind):
        return pa.date32()
    if kind == pa.time32("s"):
        return pa.time32("ms")
    if pa.types.is_timestamp(kind) and kind.unit == "s":
        return pa.timestamp("ms", kind.tz)
    if not pa.types.is_dictionary(kind):
        return kind
    value = _takeable(kind.value_type)
    if pa.types.is_large_string(value) or pa.types.is_string(value):
        return pa.dictionary(pa.int32(), pa.string(), kind.ordered)
    if pa.types.is_large_binary(value) or pa.types.is_binary(value):
        return pa.dictionary(pa.int32(), pa.binary(), kind.ordered)
    return value


def takeable(schema: pa.Schema) -> pa.Schema:
    """The same columns in types that Arrow can gather rows of, whatever dictionaries their batches have."""
    return _changed_columns(schema, lambda kind: _widened(_takeable(kind)))


def _takeable(kind: Any) -> Any:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def as_bytes(schema: pa.Schema) -> pa.Schema:
    """Columns of the same layout without a type that asks something of the bytes: no text, no extension."""
    return _changed_columns(schema, _bytes)


def _bytes(kind: Any) -> Any:
    if isinstance(kind, pa.BaseExtensionType):
        return changed(kind.storage_type, _bytes)
    if isinstance(kind, pa.RunEndEncodedType):
        return pa.run_end_encoded(kind.run_end_type, changed(kind.value_type, _bytes))
    return _BYTES.get(kind, kind)


def unordered(kind: Any) -> Any:
    """The type without a promise that the order of its categories means something."""
    return changed(kind, lambda k: pa.dictionary(k.index_type, k.value_type) if pa.types.is_dictionary(k) else k)


def is_ordered(kind: Any) -> bool:
    """Whether there are ordered categories in the type."""
    return bool(kind != unordered(kind))


def leaves(schema: pa.Schema) -> Iterator[tuple[Path, Any]]:
    """The columns of a Parquet file of this schema, in its order: the way to each, and its type."""
    for field in schema:
        yield from _leaves(field.type, (field.name,))


def _leaves(kind: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(kind, pa.BaseExtensionType):
        yield from _leaves(kind.storage_type, path)
    elif pa.types.is_dictionary(kind):
        yield path, kind.value_type
    elif pa.types.is_struct(kind):
        for at in range(kind.num_fields):
            yield from _leaves(kind.field(at).type, (*path, kind.field(at).name))
    elif pa.types.is_map(kind):
        yield from _leaves(kind.key_type, (*path, ENTRY, "key"))
        yield from _leaves(kind.item_type, (*path, ENTRY, "value"))
    elif hasattr(kind, "value_type"):
        yield from _leaves(kind.value_type, (*path, ITEM))
    else:
        yield path, kind
