"""A Parquet file's own key-value metadata: what of it may be carried from the inputs to the outputs. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pipeline.spec import json_text

Metadata = Mapping[Any, Any]
"""bytes → bytes; pyarrow's type stubs want it wider."""

_OF_ALL_COLUMNS = (
    b"ARROW:schema", b"pandas", b"huggingface", b"org.apache.spark.", b"iceberg.", b"parquet.avro.schema", b"avro.",
    b"parquet.proto.", b"writer.", b"delta.",
)  # fmt: skip
"""Begins of keys whose values describe the whole table, which an output, with its result columns, no longer is."""


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
