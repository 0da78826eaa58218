"""What only the values of a Parquet file tell of their types: ranges, the unit of INT96 times, the order of categories.

Statistics of the footer serve where there are any; else the columns in question are read, in small batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.errors import InvalidInput
from storage.objects.store import ObjectStore
from storage.parquet.arrow_schemas import ENTRY, Path, is_ordered, leaves
from storage.parquet.batches import dictionaries, readable

Order = list[list[Any]]
"""The categories of a column, in order; of each of its parts, where they are nested."""

_BATCH_ROWS = 8_192
_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_MASKS = {pa.uint32(): 2**32 - 1, pa.uint64(): 2**64 - 1}
"""Statistics have the sign of the physical type."""


def value_range(store: ObjectStore, uri: str, path: Path) -> tuple[int, int] | None:
    """Least and greatest value of the whole numbers, timestamps or durations at ``path``; times in nanoseconds.

    ``None`` when there is no value. Raises :class:`InvalidInput` when the file cannot be read.
    """
    with store.open(uri) as file, readable(uri, InvalidInput, "it is damaged"):
        # Times of INT96 have a longer range in microseconds than in nanoseconds.
        parquet = pq.ParquetFile(file, coerce_int96_timestamp_unit="us")
        found: list[int] = []
        for index, (where, kind) in enumerate(leaves(parquet.schema_arrow)):
            # Where one file has whole numbers and another has fractions, it is the whole numbers that may not fit.
            if where == path and _is_whole(kind):
                found += _from_statistics(parquet, index, kind) or _from_values(parquet, index, path)
        return (min(found), max(found)) if found else None


def _is_whole(kind: Any) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_timestamp(kind) or pa.types.is_duration(kind)


def _from_statistics(parquet: pq.ParquetFile, index: int, kind: Any) -> list[int] | None:
    """``None`` when they do not say; a chunk may also have no values at all."""
    found: list[int] = []
    for number in range(parquet.metadata.num_row_groups):
        chunk = parquet.metadata.row_group(number).column(index)
        said: Any = chunk.statistics
        if chunk.physical_type not in ("INT32", "INT64") or said is None:
            return None
        if said.has_min_max:
            raw = (said.min_raw, said.max_raw)
            found += (_scaled(value & _MASKS[kind] if kind in _MASKS else value, kind) for value in raw)
        elif not said.has_null_count or said.null_count < chunk.num_values:
            return None
    return found


def _from_values(parquet: pq.ParquetFile, index: int, path: Path) -> list[int]:
    found = []
    column = parquet.metadata.schema.column(index).path
    for batch in parquet.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False):
        values = _at(batch.column(0), path)
        whole = values if pa.types.is_integer(values.type) else values.cast(pa.int64())
        ends: Any = pc.min_max(whole).as_py()
        found += [_scaled(value, values.type) for value in ends.values() if value is not None]
    return found


def _scaled(value: int, kind: Any) -> int:
    return value if pa.types.is_integer(kind) else value * _NANOSECONDS[kind.unit]


def _at(column: Any, path: Path) -> Any:
    """The values at the end of ``path``, which begins with the column's name."""
    for step in path[1:]:
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        if isinstance(column, pa.StructArray):
            column = column.flatten()[0 if column.type.num_fields == 1 else column.type.get_field_index(step)]
        elif isinstance(column, pa.MapArray):
            if step != ENTRY:
                column = column.keys if step == "key" else column.items
        else:
            column = column.flatten()
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def intervals(parquet: pq.ParquetFile) -> dict[str, str]:
    """Why a column cannot be read, for those with Parquet's INTERVAL: Arrow reads it as twelve bytes, so that it would
    be written as bytes."""
    why = "Parquet's INTERVAL, which Arrow does not have; write it as text, or as a number of days or seconds"
    kinds = (parquet.metadata.schema.column(index).converted_type for index in range(len(parquet.metadata.schema)))
    return {
        path[0]: why for (path, _), kind in zip(leaves(parquet.schema_arrow), kinds, strict=True) if kind == "INTERVAL"
    }


def int96_units(parquet: pq.ParquetFile, file: Any, skip: Collection[str]) -> tuple[pa.Schema, dict[str, str]]:
    """The schema with each column of INT96 times in a unit that holds all of them, and why there is none, by column.

    Microseconds reach far enough for every date; nanoseconds are taken where some time has fractions of a microsecond,
    and then cannot hold times before 1677 and after 2262. All values are read: INT96 has no statistics.
    """
    places: dict[str, list[tuple[str, Path]]] = {}
    for index, (path, kind) in enumerate(leaves(parquet.schema_arrow)):
        column = parquet.metadata.schema.column(index)
        if column.physical_type == "INT96" and pa.types.is_timestamp(kind) and path[0] not in skip:
            places.setdefault(path[0], []).append((column.path, path))
    schema, unfit = parquet.schema_arrow, {}
    micros = pq.ParquetFile(file, metadata=parquet.metadata, coerce_int96_timestamp_unit="us")
    for name, columns in places.items():
        fine = far = False
        for leaf, path in columns:
            for nano, micro in zip(_numbers(parquet, leaf, path), _numbers(micros, leaf, path), strict=True):
                # Of a time that does not fit, what is left are the last 64 bits: its rest is still to be told.
                rest = (nano - micro * np.uint64(1000)).view(np.int64)
                fine |= bool(rest.any())
                far |= bool((nano.view(np.int64) // 1000 != micro.view(np.int64)).any())
        if fine and far:
            unfit[name] = (
                "some INT96 times need nanoseconds, others lie beyond the years 1677 to 2262, which nanoseconds reach"
            )
        elif not fine:
            at = schema.get_field_index(name)
            schema = schema.set(at, micros.schema_arrow.field(at))
    return schema, unfit


def _numbers(parquet: pq.ParquetFile, column: str, path: Path) -> Iterator[Any]:
    for batch in parquet.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False):
        values = _at(batch.column(0), path).drop_null().cast(pa.int64())
        yield values.to_numpy().view(np.uint64)


def category_orders(parquet: pq.ParquetFile, skip: Collection[str]) -> dict[str, list[Order]]:
    """The categories of each column that has ordered ones, as every row group with values has them, without repeats.

    Reads the first row of each row group.
    """
    orders: dict[str, list[Order]] = {}
    for field in parquet.schema_arrow:
        if field.name in skip or not is_ordered(field.type):
            continue
        found = orders.setdefault(field.name, [])
        columns = [
            parquet.metadata.schema.column(index).path
            for index, (path, _) in enumerate(leaves(parquet.schema_arrow))
            if path[0] == field.name
        ]
        for number in range(parquet.metadata.num_row_groups):
            for batch in parquet.iter_batches(1, row_groups=[number], columns=columns, use_threads=False):
                order = [values.dictionary.to_pylist() for values in dictionaries(batch.column(0))]
                if all(order) and order not in found:
                    found.append(order)
                break
    return orders
