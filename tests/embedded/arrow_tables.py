"""Strategies of hypothesis for Arrow types, columns and files, and what a column's values are in Python."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import hypothesis.strategies as st
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

UNIT = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
WHOLE = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
DECIMALS = [pa.decimal32(7, 2), pa.decimal64(15, 4), pa.decimal128(5, 2), pa.decimal128(38, 19), pa.decimal256(50, 10)]
ZONES = [None, "UTC", "Europe/Berlin", "+05:30"]
TIMES: list[Any] = [pa.timestamp(unit, zone) for unit in UNIT for zone in ZONES]
DURATIONS: list[Any] = [pa.duration(unit) for unit in UNIT]
CLOCKS = [pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")]
FOLDED: list[Any] = [
    pa.dictionary(index, value, ordered)
    for index in (pa.int8(), pa.uint16(), pa.int64())
    for value, ordered in ((pa.string(), False), (pa.string(), True), (pa.binary(), False), (pa.int32(), False))
]
TEXTS = [pa.string(), pa.large_string(), pa.string_view()]
BYTES = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3), pa.binary(5)]
OTHERS: list[Any] = [pa.null(), pa.bool_(), pa.date32(), pa.date64()]
EXTENSIONS: list[Any] = [
    pa.uuid(),
    pa.json_(),
    pa.bool8(),
    pa.opaque(pa.int16(), "kind", "vendor"),
    pa.fixed_shape_tensor(pa.float32(), (2, 2)),
]
FAMILIES: list[list[Any]] = [
    WHOLE + FLOATS + DECIMALS,
    TIMES,
    DURATIONS,
    CLOCKS,
    TEXTS + FOLDED[:2] + FOLDED[4:6],
    [*BYTES, FOLDED[2]],
    OTHERS,
]
"""Types of one family may be meant to hold the same."""
LEAVES = [kind for family in FAMILIES for kind in family] + FOLDED


def _field(kind: Any) -> Any:
    return st.builds(pa.field, st.just("item"), kind, nullable=st.booleans())


def types() -> Any:
    """Types of columns that Parquet can hold."""
    nested = st.recursive(
        st.sampled_from(LEAVES),
        lambda kind: st.one_of(
            kind.map(pa.list_),
            kind.map(pa.large_list),
            kind.map(pa.list_view),
            st.builds(pa.list_, kind, st.integers(1, 3)),
            st.builds(pa.map_, st.sampled_from([pa.string(), pa.int32(), pa.date32()]), kind),
            st.dictionaries(st.sampled_from(["a", "b", "c.d", "ü"]), kind, min_size=1, max_size=3).map(
                lambda fields: pa.struct(list(fields.items()))
            ),
        ),
        max_leaves=3,
    )
    return st.one_of(st.sampled_from(LEAVES), nested, st.sampled_from(EXTENSIONS))


def relatives(kind: Any) -> Any:
    """Types that another file may have for a column of this one."""
    family = next((family for family in FAMILIES if kind in family), [kind])
    choices = [st.sampled_from(family), st.just(pa.null()), st.sampled_from(LEAVES)]
    if pa.types.is_struct(kind):
        fields = [kind.field(at) for at in range(kind.num_fields)]
        more = [pa.field("more", pa.int8())]
        choices += [st.permutations(fields).map(pa.struct), st.just(pa.struct(fields[1:] + more))]
        choices.append(
            st.tuples(*(relatives(field.type) for field in fields)).map(
                lambda kinds: pa.struct([field.with_type(other) for field, other in zip(fields, kinds, strict=True)])
            )
        )
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        choices += [relatives(kind.value_type).map(make) for make in (pa.list_, pa.large_list)]
    return st.one_of(st.just(kind), *choices)


def values(kind: Any) -> Any:
    """Values of a type, as ``pa.array`` takes them; sometimes none."""
    return st.one_of(st.none(), st.none() if pa.types.is_null(kind) else _present(kind))


def _present(kind: Any) -> Any:
    is_ = pa.types
    if isinstance(kind, pa.FixedShapeTensorType):
        return st.lists(st.floats(width=32, allow_nan=False), min_size=4, max_size=4)
    if isinstance(kind, pa.JsonType):
        return st.sampled_from(["{}", '{"a": [1, null]}', "1"])
    if isinstance(kind, pa.BaseExtensionType):
        return _present(kind.storage_type)
    if is_.is_dictionary(kind):
        return _present(kind.value_type)
    if is_.is_boolean(kind):
        return st.booleans()
    if is_.is_integer(kind):
        low, high = (0, 2**kind.bit_width - 1)
        if is_.is_signed_integer(kind):
            low, high = -(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1) - 1
        return st.one_of(st.integers(low, high), st.sampled_from([low, high]), st.integers(0, 100))
    if is_.is_floating(kind):
        return st.floats(width=kind.bit_width)
    if is_.is_decimal(kind):
        most = 10**kind.precision - 1
        return st.integers(-most, most).map(lambda n: Decimal(n).scaleb(-kind.scale))
    if is_.is_date(kind):
        return st.dates()
    if is_.is_time(kind):
        return st.integers(0, 86_400 * 10**9 // UNIT[kind.unit] - 1)
    if is_.is_timestamp(kind) or is_.is_duration(kind):
        reach = min(2**63 - 1, 253402300799 * 10**9) // (1 if kind.unit == "ns" else UNIT[kind.unit])
        return st.one_of(st.integers(-reach // 5, reach), st.integers(0, 10**9))
    if is_.is_fixed_size_binary(kind):
        return st.binary(min_size=kind.byte_width, max_size=kind.byte_width)
    if is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind):
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    if is_.is_struct(kind):
        return st.fixed_dictionaries(
            {kind.field(at).name: values(kind.field(at).type) for at in range(kind.num_fields)}
        )
    if is_.is_map(kind):
        return st.dictionaries(_present(kind.key_type), values(kind.item_type), max_size=3).map(
            lambda d: list(d.items())
        )
    if is_.is_fixed_size_list(kind):
        return st.lists(values(kind.value_type), min_size=kind.list_size, max_size=kind.list_size)
    if hasattr(kind, "value_type"):
        return st.lists(values(kind.value_type), max_size=3)
    return st.binary(max_size=5)


def array(found: list[Any], kind: Any) -> Any:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(found, kind.storage_type))
    return pa.array(found, kind)


def plain(column: Any) -> list[Any]:
    """The values of a column so that those of two types compare equal where they are the same."""
    return [_plain(value) for value in column]


def _plain(value: Any) -> Any:
    kind = value.type
    if not value.is_valid or pa.types.is_null(kind):
        return None
    if isinstance(kind, pa.BaseExtensionType):
        storage = value.value
        return _plain(storage) if isinstance(storage, pa.Scalar) else storage
    if pa.types.is_dictionary(kind):
        return _plain(value.value)
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind) or pa.types.is_time(kind):
        return value.value * UNIT[kind.unit]
    if pa.types.is_floating(kind):
        number = float(value.as_py())
        return "nan" if number != number else number
    if pa.types.is_struct(kind):
        named = {name: _plain(item) for name, item in value.items()}
        return {name: item for name, item in named.items() if item is not None}
    if pa.types.is_map(kind):
        return [(_plain(pair["key"]), _plain(pair["value"])) for pair in value.values] if value.values else []
    if hasattr(kind, "value_type"):
        return [_plain(item) for item in value.values]
    found = value.as_py()
    return found.date() if isinstance(found, datetime.datetime) else found


def by_pyarrow(table: pa.Table, file: Path, draw: Any) -> None:
    pq.write_table(
        table,
        file,
        row_group_size=draw(st.integers(1, 10)),
        use_dictionary=draw(st.booleans()),
        write_statistics=draw(st.booleans()),
        store_schema=draw(st.booleans()),
        version=draw(st.sampled_from(["1.0", "2.6"])) if draw(st.booleans()) else "2.6",
    )


def by_polars(table: pa.Table, file: Path, draw: Any) -> None:
    with _no_panic():
        pl.from_arrow(table).write_parquet(file)  # type: ignore[union-attr]


def by_duckdb(table: pa.Table, file: Path, draw: Any) -> None:
    with duckdb.connect() as connection:
        connection.register("t", table)
        connection.execute(f"COPY t TO '{file}' (FORMAT parquet)")


def by_pandas(table: pa.Table, file: Path, draw: Any) -> None:
    table.to_pandas().to_parquet(file)


WRITERS = {"pyarrow": by_pyarrow, "polars": by_polars, "duckdb": by_duckdb, "pandas": by_pandas}


@contextmanager
def _no_panic() -> Iterator[None]:
    """Polars panics at types that it does not know, and a panic is no ``Exception``."""
    try:
        yield
    except pl.exceptions.PanicException as error:
        raise NotImplementedError(str(error)) from None


def _read_by_polars(file: Path) -> pa.Table:
    with _no_panic():
        return pl.read_parquet(file).to_arrow()


def _read_by_duckdb(file: Path) -> pa.Table:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        return connection.execute(f"SELECT * FROM read_parquet('{file}')").to_arrow_table()


READERS: dict[str, Any] = {
    "polars": _read_by_polars,
    "duckdb": _read_by_duckdb,
    "pandas": lambda file: pa.Table.from_pandas(
        pq.read_table(file).to_pandas(integer_object_nulls=True), preserve_index=False
    ),
}
