"""What a schema must keep to, so that Parquet can hold it and every reader gets it back."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import InvalidInput

MOST_LEVELS = 100
"""Of a Parquet schema, its root counted: what Arrow's reader takes by default. A list takes two, a struct one."""


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
