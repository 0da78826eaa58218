"""Files with other types, dictionaries or units of a column: every value is in the output, which all readers open."""

from __future__ import annotations

import datetime
import io
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from storage.errors import InvalidInput
from storage.parquet import batches as parquet_batches
from storage.states import JobState


def put(folder: Path, *columns: Any, **options: Any) -> None:
    """A file for each column ``c``, beside a text."""
    folder.mkdir(exist_ok=True)
    for number, column in enumerate(columns):
        texts = [f"{number} {row}" for row in range(len(column))]
        pq.write_table(pa.table({"text": texts, "c": column}), folder / f"{number:03d}.parquet", **options)


def run(client: Client, tmp_path: Path, source: Path | None = None, **more: Any) -> pa.Table:
    fields = {"output": str(tmp_path / "out"), "model": "fake", "task": "generate", "prompt": "{text}"} | more
    status = client.run(input=str(source or tmp_path / "in"), **fields)
    assert (status.state, status.rows_failed) == (JobState.COMPLETED, 0)
    table = pa.concat_tables(
        [pq.read_table(file) for file in sorted((tmp_path / "out/data").glob("*.parquet"))], promote_options="none"
    )
    table.validate(full=True)
    return table


def folded(values: list[str | None], ordered: bool = False, index: Any = None) -> Any:
    categories = sorted({value for value in values if value is not None})
    codes = pa.array([None if value is None else categories.index(value) for value in values], index or pa.int8())
    return pa.DictionaryArray.from_arrays(codes, categories, ordered=ordered)


@pytest.mark.parametrize("nest", ["plain", "list", "struct", "map"])
@pytest.mark.parametrize("shard_rows", [None, 60])
def test_categories_of_several_files(client: Client, tmp_path: Path, nest: str, shard_rows: int | None) -> None:
    columns = []
    for number in range(3):
        values = folded([f"{number} {row}" for row in range(100)])
        offsets = pa.array(range(101), pa.int32())
        columns.append(
            {
                "plain": lambda values, _: values,
                "list": lambda values, offsets: pa.ListArray.from_arrays(offsets, values),
                "struct": lambda values, _: pa.StructArray.from_arrays([values], ["x"]),
                "map": lambda values, offsets: pa.MapArray.from_arrays(offsets, pa.array(["k"] * 100), values),
            }[nest](values, offsets)
        )
    put(tmp_path / "in", *columns)
    table = run(client, tmp_path, shard_rows=shard_rows or 1000)
    assert table["c"].to_pylist() == [value for column in columns for value in column.to_pylist()]
    assert "dictionary<values=string" in str(table["c"].type)


def test_categories_of_several_row_groups(client: Client, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pieces = [folded([f"{number} {row}" for row in range(100)]) for number in range(3)]
    schema = pa.schema([("text", pa.string()), ("c", pieces[0].type)])
    with pq.ParquetWriter(tmp_path / "in/a.parquet", schema) as writer:
        for piece in pieces:
            writer.write_table(pa.table([pa.array(["t"] * 100), piece], schema=schema))
    assert run(client, tmp_path)["c"].to_pylist() == [value for piece in pieces for value in piece.to_pylist()]


def test_a_stream_that_replaces_its_dictionary(client: Client, tmp_path: Path) -> None:
    pieces = [pa.array([f"v{number}"], pa.string()).dictionary_encode() for number in range(150)]
    pieces = [piece.cast(pa.dictionary(pa.int8(), pa.string())) for piece in pieces]
    schema = pa.schema([("text", pa.string()), ("c", pieces[0].type)])
    with pa.ipc.new_stream(str(tmp_path / "in.arrow"), schema) as stream:
        for piece in pieces:
            stream.write_batch(pa.record_batch([pa.array(["t"]), piece], schema=schema))
    table = run(client, tmp_path, tmp_path / "in.arrow")
    assert table["c"].to_pylist() == [f"v{number}" for number in range(150)]


@pytest.mark.parametrize(
    "column",
    [
        folded(["a", "b"]).cast(pa.dictionary(pa.int8(), pa.large_string())),
        pa.DictionaryArray.from_arrays(pa.array([1, None], pa.int8()), pa.array([10, 2**40])),
        pa.DictionaryArray.from_arrays(pa.array([1, 0], pa.int8()), pa.array([b"ab", b"cd"], pa.binary(2))),
        pa.array([1, None], pa.timestamp("s")),
        pa.array([1, None], pa.time32("s")),
        pa.array([86_400_000, None], pa.date64()),
    ],
    ids=lambda column: str(column.type),
)
def test_arrow_types_that_parquet_stores_as_others(client: Client, tmp_path: Path, column: Any) -> None:
    table = pa.table({"text": ["x", "y"], "c": column})
    with pa.ipc.new_file(str(tmp_path / "in.arrow"), table.schema) as file:
        file.write_table(table)
    assert run(client, tmp_path, tmp_path / "in.arrow")["c"].to_pylist() == column.to_pylist()


def test_what_parquets_type_does_not_hold_is_refused_by_name(client: Client, tmp_path: Path) -> None:
    table = pa.table({"text": ["x"], "c": pa.array([2**62], pa.timestamp("s"))})
    with pa.ipc.new_file(str(tmp_path / "in.arrow"), table.schema) as file:
        file.write_table(table)
    with pytest.raises(InvalidInput, match=r"column 'c' is timestamp\[s\]"):
        run(client, tmp_path, tmp_path / "in.arrow")


def test_the_order_of_categories_holds_where_all_files_agree(client: Client, tmp_path: Path) -> None:
    names = ["low", "middle", "high", "never used"]
    sizes = [pa.DictionaryArray.from_arrays(pa.array(at, pa.int8()), names, ordered=True) for at in ([2, 0], [1, None])]
    put(tmp_path / "in", *sizes)
    column = run(client, tmp_path)["c"]
    assert column.to_pylist() == ["high", "low", "middle", None]
    assert column.type.ordered
    assert column.chunk(0).dictionary.to_pylist() == names


def test_the_order_of_categories_is_given_up_where_files_disagree(client: Client, tmp_path: Path) -> None:
    orders = (["low", "high"], ["high", "low"])
    put(tmp_path / "in", *(pa.DictionaryArray.from_arrays(pa.array([0, 1]), names, ordered=True) for names in orders))
    column = run(client, tmp_path)["c"]
    assert column.to_pylist() == ["low", "high", "high", "low"]
    assert not column.type.ordered


def test_batches_of_folded_text_are_as_small_as_those_of_plain_text() -> None:
    file = io.BytesIO()
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 700, pa.int32()), ["y" * 10**6])
    pq.write_table(pa.table({"c": same}), file)
    reader = parquet_batches.Readable(file, None, 1024, 8 * 10**6)
    batches = [
        batch for group in parquet_batches.row_groups(reader.footer, 0, 700) for _, batch in reader.batches(group)
    ]
    assert sum(batch.num_rows for batch in batches) == 700
    assert max(batch.num_rows for batch in batches) <= 8


FAR, ODD = 253402300799000000, 1700000000000000001
"""The end of the year 9999 in microseconds; a time in nanoseconds."""


@pytest.mark.parametrize("nest", [False, True])
def test_int96_beyond_what_nanoseconds_reach(client: Client, tmp_path: Path, nest: bool) -> None:
    kind: Any = pa.timestamp("us")
    column = pa.array([[FAR], [1], None] if nest else [FAR, 1, None], pa.list_(kind) if nest else kind)
    put(tmp_path / "in", column, use_deprecated_int96_timestamps=True, store_schema=False)
    assert run(client, tmp_path)["c"].to_pylist() == column.to_pylist()


def test_int96_with_nanoseconds_keeps_them_beside_a_column_that_reaches_far(client: Client, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    columns = {"odd": pa.array([ODD], pa.timestamp("ns")), "far": pa.array([FAR], pa.timestamp("us"))}
    pq.write_table(
        pa.table({"text": ["t"], **columns}), tmp_path / "in/a.parquet", use_deprecated_int96_timestamps=True
    )
    table = run(client, tmp_path)
    assert [table[name].cast(pa.int64()).to_pylist() for name in columns] == [[ODD], [FAR]]
    assert [table[name].type.unit for name in columns] == ["ns", "us"]


def test_int96_that_no_unit_holds_is_refused_by_name(client: Client, tmp_path: Path) -> None:
    times = [pa.array([ODD], pa.timestamp("ns")), pa.array([FAR], pa.timestamp("us"))]
    column = pa.StructArray.from_arrays(times, ["odd", "far"])
    put(tmp_path / "in", column, use_deprecated_int96_timestamps=True)
    with pytest.raises(InvalidInput, match=r"column 'c' .*INT96"):
        run(client, tmp_path)
    assert run(client, tmp_path, keep_columns=["text"])["text"].to_pylist() == ["0 0"]


@pytest.mark.parametrize("value", ["INTERVAL 1 DAY", "[INTERVAL 1 DAY]", "{'a.b': INTERVAL 1 DAY}"])
def test_parquets_intervals_are_refused_by_name(client: Client, tmp_path: Path, value: str) -> None:
    with duckdb.connect() as connection:
        connection.execute(f"COPY (SELECT 't' AS text, {value} AS c) TO '{tmp_path / 'a.parquet'}' (FORMAT parquet)")
    with pytest.raises(InvalidInput, match=r"column 'c' .*a.parquet .*INTERVAL"):
        run(client, tmp_path, tmp_path / "a.parquet")
    assert run(client, tmp_path, tmp_path / "a.parquet", keep_columns=["text"])["text"].to_pylist() == ["t"]


TWO_FILES: dict[str, tuple[Any, Any, Any]] = {
    "int64 and double": (pa.array([2**53]), pa.array([0.5]), pa.float64()),
    "too large for a double": (pa.array([2**53 + 1]), pa.array([0.5]), None),
    "uint64 and int64": (pa.array([2**64 - 1], pa.uint64()), pa.array([-1]), pa.decimal128(20, 0)),
    "uint64 and a positive int64": (pa.array([2**64 - 1], pa.uint64()), pa.array([1]), pa.uint64()),
    "decimal and int": (pa.array([Decimal("1.25")], pa.decimal128(5, 2)), pa.array([10**15]), pa.decimal128(21, 2)),
    "decimal and double": (pa.array([Decimal(1)], pa.decimal128(38, 19)), pa.array([0.1]), None),
    "far and fine": (pa.array([FAR], pa.timestamp("us")), pa.array([ODD], pa.timestamp("ns")), None),
    "near and fine": (pa.array([1], pa.timestamp("us")), pa.array([1001], pa.timestamp("ns")), pa.timestamp("ns")),
    "with and without zone": (pa.array([1], pa.timestamp("us", "UTC")), pa.array([1], pa.timestamp("us")), None),
    "text and bytes": (pa.array(["a"]), pa.array([b"b"]), None),
    "categories and text": (folded(["a"]), pa.array(["b"]), pa.string()),
    "numbers in lists": (pa.array([[2**53 + 1]]), pa.array([[0.5]]), None),
    "numbers in structs": (
        pa.array([{"n": 7}]),
        pa.array([{"n": 0.5}]),
        pa.struct([("n", pa.float64())]),
    ),
    "nothing and something": (pa.nulls(1), pa.array([[1]]), pa.list_(pa.int64())),
    "dates and times": (pa.array([datetime.date(2024, 1, 1)]), pa.array([1], pa.timestamp("us")), None),
}


@pytest.mark.parametrize("statistics", [True, False], ids=["statistics", "none"])
@pytest.mark.parametrize("name", TWO_FILES)
def test_types_of_two_files(client: Client, tmp_path: Path, name: str, statistics: bool) -> None:
    one, other, kind = TWO_FILES[name]
    put(tmp_path / "in", one, other, write_statistics=statistics)
    if kind is None:
        with pytest.raises(InvalidInput, match=r"column 'c' is .* in .*000\.parquet and .* in .*001\.parquet"):
            run(client, tmp_path)
        assert not (tmp_path / "out").exists()
        return
    column = run(client, tmp_path)["c"]
    assert (column.type, column.to_pylist()) == (kind, one.to_pylist() + other.to_pylist())


def test_categories_in_a_list_view_are_refused_by_name(client: Client, tmp_path: Path) -> None:
    kind = pa.list_view(pa.dictionary(pa.int8(), pa.string()))
    put(tmp_path / "in", pa.array([["a"]], kind))
    with pytest.raises(InvalidInput, match=r"000\.parquet: column 'c' has categories in a list view"):
        run(client, tmp_path)
