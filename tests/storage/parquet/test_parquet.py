"""Reading rows in bounded batches and writing them with checksums, through real files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from storage.errors import CorruptFile, InputChanged, InvalidInput
from storage.objects import reader_cache
from storage.objects.store import ObjectStore
from storage.parquet import parquet
from storage.records import Slice, Source
from tests.conftest import S3
from tests.examples import examples

STORE = ObjectStore()
LABELLED = pa.struct({"label": pa.string(), "score": pa.float32()})


def source(path: Path | str, idx: int = 0, store: ObjectStore = STORE, **partition: str | None) -> Source:
    info = store.info(str(path))
    rows = parquet.stats(store, info.uri).n_rows
    return Source(idx, info.uri, info.etag, info.n_bytes, rows, partition)


def read(
    sources: Sequence[Source],
    slices: Sequence[tuple[int, int, int]] | None = None,
    *,
    store: ObjectStore = STORE,
    schema: pa.Schema | None = None,
    columns: Sequence[str] | None = None,
    only: BitMap | None = None,
    batch_rows: int = 1000,
    batch_bytes: int = 2**24,
) -> list[tuple[np.ndarray[Any, Any], pa.RecordBatch]]:
    slices = [(s.idx, 0, s.n_rows) for s in sources] if slices is None else slices
    schema = parquet.stats(store, sources[0].uri).schema if schema is None else schema
    return list(
        parquet.read(
            store,
            {s.idx: s for s in sources},
            [Slice(*item) for item in slices],
            schema=schema,
            columns=schema.names if columns is None else columns,
            only=only,
            batch_rows=batch_rows,
            batch_bytes=batch_bytes,
        )
    )


def rows_of(batches: Sequence[tuple[np.ndarray[Any, Any], pa.RecordBatch]]) -> list[int]:
    return [int(row) for rows, _ in batches for row in rows]


def values_of(batches: Sequence[tuple[Any, pa.RecordBatch]], name: str = "a") -> list[Any]:
    return [value for _, batch in batches for value in batch.column(name).to_pylist()]


# -- footers


def test_stats_come_from_the_footer(tmp_path: Path) -> None:
    table = pa.table({"a": range(2500), "t": ["x" * 10] * 2500})
    pq.write_table(table, tmp_path / "f.parquet", row_group_size=1000)
    found = parquet.stats(STORE, str(tmp_path / "f.parquet"))
    assert (found.n_rows, found.schema) == (2500, table.schema)
    assert [rows for rows, _ in found.row_groups] == [1000, 1000, 500]
    assert all(n_bytes > 0 for _, n_bytes in found.row_groups)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"a,b\n1,2\n", b"PAR1" + b"x" * 200 + b"\x10\0\0\0PAR1"])
def test_what_is_no_parquet_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.parquet"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"bad\.parquet: it is not a readable Parquet file \(.+\)"):
        parquet.stats(STORE, str(path))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InvalidInput, match="nowhere"):
        parquet.stats(STORE, "/nowhere/f.parquet")


# -- reading


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_slices_are_read_exactly(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("slices")
    sizes = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
    sources = []
    for idx, size in enumerate(sizes):
        table = pa.table({"a": pa.array([f"{idx}:{row}" for row in range(size)], pa.string())})
        pq.write_table(table, folder / f"{idx}.parquet", row_group_size=data.draw(st.integers(1, 25)))
        sources.append(source(folder / f"{idx}.parquet", idx))
    slices = []
    for idx, size in enumerate(sizes):
        lo = data.draw(st.integers(0, size))
        slices.append((idx, lo, data.draw(st.integers(0, size - lo))))
    wanted = [f"{idx}:{row}" for idx, lo, n in slices for row in range(lo, lo + n)]
    only = data.draw(st.none() | st.sets(st.integers(0, max(0, len(wanted) - 1))).map(BitMap))
    batch_rows = data.draw(st.integers(1, 30))
    found = read(sources, slices, only=only, batch_rows=batch_rows, batch_bytes=data.draw(st.integers(1, 200)))
    expected = [row for row in range(len(wanted)) if only is None or row in only]
    assert rows_of(found) == expected
    assert values_of(found) == [wanted[row] for row in expected]
    assert all(0 < batch.num_rows <= batch_rows and rows.dtype == np.int64 for rows, batch in found)


def test_row_groups_outside_the_slice_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"a": range(3000)}), path, row_group_size=1000, compression="none", use_dictionary=False)
    first = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    content[first.data_page_offset : first.data_page_offset + 200] = b"\xff" * 200
    path.write_bytes(content)
    assert values_of(read([source(path)], [(0, 1500, 1500)])) == list(range(1500, 3000))
    assert values_of(read([source(path)], only=BitMap([2999]))) == [2999]
    with pytest.raises(InvalidInput, match=r"f\.parquet, row group 0: it is damaged"):
        read([source(path)])


def test_the_next_slice_of_a_row_group_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    """What comes before it in the row group is spoilt meanwhile: it is neither read nor decoded again."""
    path, store = tmp_path / "f.parquet", ObjectStore()
    pq.write_table(pa.table({"a": range(3_000_000)}), path, compression="none", use_dictionary=False)
    found = source(path)
    assert values_of(read([found], [(0, 0, 10)], store=store)) == list(range(10))
    stat = path.stat()
    content = bytearray(path.read_bytes())
    at = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    content[at : at + 200] = b"\xff" * 200
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert values_of(read([found], [(0, 500_000, 10)], store=store)) == list(range(500_000, 500_010))
    with pytest.raises(InvalidInput, match="damaged"):
        read([found], [(0, 400_000, 10)], store=store)
    assert values_of(read([found], [(0, 1_000_000, 10)], store=store)) == list(range(1_000_000, 1_000_010))
    read([found], [(0, 2_900_000, 100_000)], store=store)
    assert store.open_readers.take((found.uri, found.etag, ("a",), 1000, 2**24), 3_000_000) is None, (
        "nothing is left of it"
    )


def test_only_a_few_readers_are_left_open(tmp_path: Path) -> None:
    store = ObjectStore()
    for number in range(reader_cache.MOST + 3):
        pq.write_table(pa.table({"a": range(100)}), tmp_path / f"{number}.parquet")
        read([source(tmp_path / f"{number}.parquet")], [(0, 0, 10)], store=store)
    here = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert sum(name.startswith(str(tmp_path)) for name in here) == reader_cache.MOST
    store.close()
    here = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not any(name.startswith(str(tmp_path)) for name in here)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    table = pa.table({"a": np.arange(10_000)})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    found = source(path)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert STORE.info(str(path)).etag == found.etag, "only the checksum can tell"
    with pytest.raises(InvalidInput, match="damaged"):
        read([found])


def test_a_changed_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    found = source(path)
    pq.write_table(pa.table({"a": [2]}), path)
    with pytest.raises(InputChanged, match=r"f\.parquet was changed"):
        read([found])
    path.unlink()
    schema = pa.schema([pa.field("a", pa.int64())])
    with pytest.raises(InputChanged, match=r"f\.parquet is gone"):
        read([found], schema=schema)


def test_columns_are_cast_filled_and_taken_from_the_partition(tmp_path: Path) -> None:
    pq.write_table(pa.table({"b": pa.array([1, 2], pa.int32()), "a": ["x", "y"]}), tmp_path / "f.parquet")
    tensor = pa.fixed_shape_tensor(pa.float32(), (2, 2))
    schema = pa.schema(
        [
            pa.field("a", pa.large_string()),
            pa.field("b", pa.float64()),
            pa.field("missing", pa.list_(pa.int8())),
            pa.field("tensor", tensor),
            pa.field("year", pa.int32()),
            pa.field("lang", pa.string()),
            pa.field("none", pa.string()),
        ]
    )
    [(_, batch)] = read([source(tmp_path / "f.parquet", year="2024", lang="de", none=None)], schema=schema)
    assert batch.schema == schema
    assert batch.to_pylist() == [
        {"a": "x", "b": 1.0, "missing": None, "tensor": None, "year": 2024, "lang": "de", "none": None},
        {"a": "y", "b": 2.0, "missing": None, "tensor": None, "year": 2024, "lang": "de", "none": None},
    ]
    [(_, batch)] = read([source(tmp_path / "f.parquet", year="2024")], schema=schema, columns=["year"])
    assert batch.to_pydict() == {"year": [2024, 2024]}


def test_a_value_that_does_not_fit_is_an_input_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [2**53 + 1]}), tmp_path / "f.parquet")
    with pytest.raises(InvalidInput, match=r"f\.parquet, row group 0: its values do not fit"):
        read([source(tmp_path / "f.parquet")], schema=pa.schema([pa.field("a", pa.float64())]))


def test_no_columns_still_count_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": range(25)}), tmp_path / "f.parquet", row_group_size=10)
    found = read([source(tmp_path / "f.parquet")], columns=[], batch_rows=7, only=BitMap(range(3, 20)))
    assert rows_of(found) == list(range(3, 20))
    assert [batch.num_rows for _, batch in found] == [len(rows) for rows, _ in found]


def test_every_kind_of_column_passes_untouched(tmp_path: Path) -> None:
    table = pa.table(
        {
            "nested": [[{"x": [1, None]}], None, []],
            "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
            "large": pa.array(["x", None, "z"], pa.large_string()),
            "decimal": [Decimal("1.23"), None, Decimal("-9.99")],
            "time": pa.array([1, None, 3], pa.timestamp("us", "UTC")),
            "binary": [b"\xff\x00", None, b""],
            "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int32())),
            "a.b": [1, 2, 3],
            "a": [{"b": 4}, {"b": 5}, None],
        }
    )
    pq.write_table(table, tmp_path / "f.parquet", row_group_size=2)
    found = read([source(tmp_path / "f.parquet")])
    assert pa.Table.from_batches([batch for _, batch in found]).to_pylist() == table.to_pylist()
    for name in table.column_names:
        found = read([source(tmp_path / "f.parquet")], columns=[name])
        assert values_of(found, name) == table.column(name).to_pylist()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_bytes_that_are_not_utf8_do_not_stop_the_reader(tmp_path: Path, kind: pa.DataType) -> None:
    raw = [b"fine", b"\xff\xfe", b"fine too"] * 200
    text = pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())
    pq.write_table(pa.table({"a": text}), tmp_path / "f.parquet")
    schema = pa.schema([pa.field("a", kind)])
    for batch_bytes in (2**24, 100):
        found = read([source(tmp_path / "f.parquet")], schema=schema, batch_bytes=batch_bytes)
        assert [bytes(value.as_buffer()) for _, batch in found for value in batch.column(0)] == raw


def test_batches_stay_within_the_bytes_that_the_footer_promises(tmp_path: Path) -> None:
    table = pa.table({"a": [os.urandom(1000).hex() for _ in range(2000)], "b": range(2000)})
    pq.write_table(table, tmp_path / "f.parquet")
    found = read([source(tmp_path / "f.parquet")], batch_bytes=100_000)
    assert max(batch.nbytes for _, batch in found) < 150_000
    assert values_of(found) == table.column("a").to_pylist()
    narrow = read([source(tmp_path / "f.parquet")], columns=["b"], batch_bytes=100_000)
    assert {batch.num_rows for _, batch in narrow} == {1000}, "only the columns that are read count"


def test_a_small_file_that_unfolds_to_gigabytes_is_read_in_small_batches(tmp_path: Path) -> None:
    """Half a megabyte once, referred to 20,000 times: 10 GB, where the footer promises half a megabyte."""
    big = "x" * 500_000
    values = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0] * 5000, pa.int32()), pa.array([big, "small"]))
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"a": values.cast(pa.dictionary(pa.int32(), pa.string())), "b": range(20_000)}), path)
    table = pq.read_table(path, columns=["b"]).append_column("a", values)
    pq.write_table(table, path, store_schema=False)
    assert path.stat().st_size < 1_000_000
    schema = pa.schema([pa.field("a", pa.string()), pa.field("b", pa.int64())])
    before = pa.total_allocated_bytes()
    seen = 0
    for rows, batch in parquet.read(
        STORE,
        {0: source(path)},
        [Slice(0, 100, 400)],
        schema=schema,
        columns=["a", "b"],
        only=None,
        batch_rows=1024,
        batch_bytes=4_000_000,
    ):
        assert batch.nbytes < 5_000_000
        assert pa.total_allocated_bytes() - before < 40_000_000
        assert batch.column("b").to_pylist() == [int(row) + 100 for row in rows]
        lengths = [None if v is None else len(v) for v in batch.column("a").to_pylist()]
        assert lengths == [[500_000, 5, None, 500_000][(int(row) + 100) % 4] for row in rows]
        seen += batch.num_rows
    assert seen == 400


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("text in lists", pa.array([[], *[["x" * 200_000] * 10] * 99])),
        ("text in structs", pa.array([{"b": {"c": "x" * 200_000}}] * 400)),
        ("numbers in lists", pa.array([[0.0] * 200_000] * 100)),
        ("bytes of one length", pa.array([b"x" * 200_000] * 400, pa.binary(200_000))),
    ],
)
def test_a_value_that_is_stored_once_counts_each_time(tmp_path: Path, name: str, column: pa.Array[Any]) -> None:
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"a": column}), path, store_schema=False)
    schema = pq.read_schema(path)
    assert path.stat().st_size < 2_000_000
    before = pa.total_allocated_bytes()
    batches = parquet.read(
        STORE, {0: source(path)}, [Slice(0, 0, 20)], schema=schema, columns=["a"], only=None, batch_rows=1024,
        batch_bytes=8_000_000,
    )  # fmt: skip
    for _, batch in batches:
        assert batch.nbytes < 10_000_000
        assert pa.total_allocated_bytes() - before < 60_000_000


def test_long_values_that_are_not_repeated_do_not_make_small_batches(tmp_path: Path) -> None:
    table = pa.table({"a": [os.urandom(500).hex() for _ in range(20_000)]})
    pq.write_table(table, tmp_path / "f.parquet")
    found = read([source(tmp_path / "f.parquet")], batch_rows=1024, batch_bytes=2**21)
    assert values_of(found) == table.column("a").to_pylist()
    assert len(found) == 20


def test_reading_from_s3(s3: S3) -> None:
    store = ObjectStore(s3.storage_options)
    table = pa.table({"a": range(5000), "b": [os.urandom(50).hex() for _ in range(5000)]})
    with parquet.writer(store, s3.url("in/f.parquet"), table.schema) as file:
        file.write(table)
    store.verify(file.written)
    found = source(s3.url("in/f.parquet"), store=store)
    assert found.etag == file.written.etag
    assert values_of(read([found], [(0, 10, 4000)], store=store), "b") == table.column("b").to_pylist()[10:4010]
    store.put_bytes(s3.url("in/f.parquet"), b"something else")
    with pytest.raises(InputChanged):
        read([found], store=store, schema=table.schema)


# -- writing


def test_files_have_checksums_zstd_and_bounded_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 1000)
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 100_000)
    schema = pa.schema([pa.field("a", pa.int64()), pa.field("b", pa.binary())])
    with parquet.writer(STORE, str(tmp_path / "f.parquet"), schema) as file:
        for start in range(0, 3000, 30):
            batch = pa.table({"a": range(start, start + 30), "b": [b"x"] * 30}, schema=schema).to_batches()[0]
            file.write(batch)
        file.write(pa.table({"a": range(500), "b": [os.urandom(1000)] * 500}, schema=schema))
    assert file.n_rows == 3500
    STORE.verify(file.written)
    metadata = pq.read_metadata(tmp_path / "f.parquet")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    assert max(group.num_rows for group in groups) <= 1000
    assert max(group.total_byte_size for group in groups) <= 110_000
    assert metadata.num_rows == 3500
    assert {g.column(0).compression for g in groups} == {"ZSTD"}
    content = bytearray((tmp_path / "f.parquet").read_bytes())
    at = groups[-1].column(1).dictionary_page_offset or groups[-1].column(1).data_page_offset
    content[at + 60] ^= 1
    (tmp_path / "f.parquet").write_bytes(content)
    with pytest.raises(InvalidInput, match="damaged"):
        read([source(tmp_path / "f.parquet")])


def test_an_exception_while_writing_leaves_nothing(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("a", pa.int64())])
    with pytest.raises(ZeroDivisionError), parquet.writer(STORE, str(tmp_path / "f.parquet"), schema) as file:
        file.write(pa.table({"a": range(100_000)}))
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="schema"), parquet.writer(STORE, str(tmp_path / "g"), schema) as file:
        file.write(pa.table({"a": ["x"]}))
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_parquet_cannot_hold_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(pa.ArrowNotImplementedError):
        parquet.writer(STORE, str(tmp_path / "f.parquet"), pa.schema([pa.field("a", pa.struct([]))]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "values",
    [
        pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2)),
        pa.array([[[1], None, []], None, [[2, 3]]], pa.list_(pa.list_(pa.int64()))),
        pa.array([[{"label": "a", "score": 0.5}], None, []], pa.list_(LABELLED)),
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), (2, 2)),
            pa.array([[1.0, 2, 3, 4], None, [5.0, 6, 7, 8]], pa.list_(pa.float32(), 4)),
        ),
        pa.array([None, None, None], pa.list_(pa.float16(), 3)),
        pa.array([True, None, False]),
    ],
    ids=lambda values: str(values.type),
)
def test_null_rows_survive(tmp_path: Path, values: pa.Array[Any]) -> None:
    table = pa.table({"a": values})
    with parquet.writer(STORE, str(tmp_path / "f.parquet"), table.schema) as file:
        file.write(table.slice(0, 1))
        file.write(table.slice(1, 2))
    found = source(tmp_path / "f.parquet")
    batches = read([found], schema=table.schema, batch_rows=2)
    back = pa.Table.from_batches([batch for _, batch in batches])
    assert back.schema.types == table.schema.types
    assert back.column(0).combine_chunks().equals(values)


def test_scan_names_damage_in_our_own_files(tmp_path: Path) -> None:
    with parquet.writer(STORE, str(tmp_path / "f.parquet"), pa.schema([pa.field("a", pa.int64())])) as file:
        file.write(pa.table({"a": range(100_000)}))
    content = bytearray((tmp_path / "f.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    _, n_rows, batches = parquet.scan(pa.BufferReader(bytes(content)), "f", batch_rows=100, batch_bytes=2**20)
    assert n_rows == 100_000
    with pytest.raises(CorruptFile, match="f, row group"):
        list(batches)
    with pytest.raises(CorruptFile, match="not a readable"):
        parquet.scan(pa.BufferReader(bytes(content[:500])), "f", batch_rows=100, batch_bytes=2**20)


def test_vectors_are_not_tried_as_dictionaries_and_all_else_is(tmp_path: Path) -> None:
    """Their numbers hardly repeat. What repeats is small in the file, at any depth."""
    columns = {
        "a.b": pa.array(["q", "q"]),
        "y": pa.array([1.0, 1.0]),
        "x": pa.array([[1.0, 2.0]] * 2, pa.list_(pa.float32(), 2)),
        "ids": pa.array([[1], [1]]),
        "s": pa.array([{"f": 1.0, "v": [1.0], "t": "z"}] * 2),
        "m": pa.array([[("k", 1.0)]] * 2, pa.map_(pa.string(), pa.float64())),
    }
    with parquet.writer(ObjectStore(), str(tmp_path / "a.parquet"), (table := pa.table(columns)).schema) as file:
        file.write(table)
    footer = pq.read_metadata(tmp_path / "a.parquet")
    chunks = (footer.row_group(0).column(at) for at in range(footer.num_columns))
    plain = {chunk.path_in_schema for chunk in chunks if "RLE_DICTIONARY" not in chunk.encodings}
    assert plain == {"x.list.element", "s.v.list.element"}
    assert pq.read_table(tmp_path / "a.parquet").equals(table)
