"""Part files in, one ordered file out: whatever order the results came in, and whatever happened to the parts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from pipeline.engines.base import ResultBatch, RowFailure
from pipeline.inputs.input_rows import InputRows
from pipeline.output import assemble as assembly
from pipeline.output import merge
from pipeline.output.assemble import Assembled, OutputColumns, assemble, result_table
from pipeline.output.merge import Run
from storage.errors import CorruptFile, RowmillError
from storage.objects.store import ObjectStore
from storage.parquet import parquet
from storage.records import OUTPUT_SEQ, PartFile, Slice, Source
from tests.examples import examples

STORE = ObjectStore()
SCHEMA = pa.schema([pa.field("output", pa.string()), pa.field("tokens", pa.int32())])
FAILED = "failed"


def results(rows: dict[int, str]) -> ResultBatch:
    """Rows → what they got: a text, or ``FAILED``."""
    fine = [row for row, text in rows.items() if text != FAILED]
    values = pa.record_batch(
        [pa.array([rows[r] for r in fine], pa.string()), pa.array(fine, pa.int32())], schema=SCHEMA
    )
    failures = tuple(RowFailure(row, "engine_refused", f"row {row}") for row, text in rows.items() if text == FAILED)
    return ResultBatch(np.array(fine, dtype=np.int64), values, failures)


class Shard:
    """A shard of ``n`` rows over two input files, and the part files of its attempts."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.n = folder, n
        self.parts: list[PartFile] = []
        table = pa.table({"id": range(n + 5), "text": [f"text {i}" for i in range(n + 5)]})
        self.schema = table.schema
        cut = n // 3
        self.sources = {}
        for idx, piece in enumerate((table.slice(0, cut), table.slice(cut))):
            path = folder / f"in{idx}.parquet"
            pq.write_table(piece, path, row_group_size=7)
            info = STORE.info(str(path))
            self.sources[idx] = Source(idx, info.uri, info.etag, info.n_bytes, piece.num_rows)
        self.slices = [item for item in (Slice(0, 0, cut), Slice(1, 0, n - cut)) if item.row_n]

    def flush(self, *batches: dict[int, str], attempt_no: int = 1) -> PartFile:
        table = result_table(SCHEMA, [results(batch) for batch in batches])
        uri = f"{self.folder}/attempt/part-{len(self.parts)}.parquet"
        with parquet.writer(STORE, uri, table.schema) as file:
            file.write(table)
        rows = {row: text for batch in batches for row, text in batch.items()}
        part = PartFile(
            attempt_no,
            len(self.parts),
            uri,
            file.written.n_bytes,
            file.written.sha256,
            file.written.etag,
            BitMap(rows),
            BitMap(row for row, text in rows.items() if text == FAILED),
        )
        self.parts.append(part)
        return part

    def assemble(self, name: str = "output", **overrides: Any) -> Assembled:
        rows = InputRows(STORE, self.sources, self.slices, self.schema, batch_rows=16, batch_bytes=2**20)
        schema = overrides.pop("result_schema", SCHEMA)
        columns = OutputColumns(overrides.pop("keep", ("id", "text")), schema, overrides.pop("prefix", ""))
        limits = {key: overrides.pop(key) for key in ("batch_rows", "batch_bytes") if key in overrides}
        arguments = {"parts": self.parts, "base": None, **overrides}
        return assemble(replace(rows, **limits), f"{self.folder}/{name}.parquet", columns, **arguments)

    def as_base(self, assembled: Assembled) -> PartFile:
        written = assembled.written
        rows = BitMap(range(self.n)) - BitMap(r for low, high in assembled.missing for r in range(low, high))
        return PartFile(
            1, OUTPUT_SEQ, written.uri, written.n_bytes, written.sha256, written.etag, rows, assembled.failed
        )


def output(shard: Shard, name: str = "output") -> list[dict[str, Any]]:
    return pq.read_table(shard.folder / f"{name}.parquet").to_pylist()


def row(number: int, text: str, **kept: Any) -> dict[str, Any]:
    error = {"code": "engine_refused", "message": f"row {number}"}
    result = {"output": None, "tokens": None, "error": error} if text == FAILED else {}
    return {"id": number, "text": f"text {number}", "output": text, "tokens": number, "error": None, **result, **kept}


# -- the layout of part files


def test_a_part_file_is_sorted_with_nulls_for_failed_rows() -> None:
    table = result_table(SCHEMA, [results({5: "five", 2: FAILED}), results({0: "zero"})])
    assert table.schema.names == ["__row", "output", "tokens", "error"]
    assert table.schema.field("error").type == assembly.ERROR_TYPE
    assert table.to_pylist() == [
        {"__row": 0, "output": "zero", "tokens": 0, "error": None},
        {"__row": 2, "output": None, "tokens": None, "error": {"code": "engine_refused", "message": "row 2"}},
        {"__row": 5, "output": "five", "tokens": 5, "error": None},
    ]


def test_only_failures_still_have_the_layout() -> None:
    failures = (RowFailure(1, "x", "m"),)
    table = result_table(SCHEMA, [ResultBatch(np.array([], np.int64), None, failures)])
    assert table.num_rows == 1 and table.schema.names == ["__row", "output", "tokens", "error"]
    assert result_table(SCHEMA, []).num_rows == 0


@pytest.mark.parametrize(
    "values",
    [
        pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
        pa.array([[[1], []], []], pa.list_(pa.list_(pa.int64()))),
        pa.array([[("a", 0.5)], []], pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))),
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), (2, 1)), pa.array([[1.0, 2], [3.0, 4]], pa.list_(pa.float32(), 2))
        ),
        pa.array([True, False]),
    ],
    ids=lambda values: str(values.type),
)
def test_failed_rows_are_null_in_every_type(tmp_path: Path, values: pa.Array[Any]) -> None:
    """Through a part file, a merge with another part, and the output."""
    schema = pa.schema([pa.field("x", values.type, nullable=False)])
    shard = Shard(tmp_path, 4)
    for rows, batch in (([3, 0], values), ([2], values.slice(1, 1))):
        failures = (RowFailure(1, "c", "m"),) if len(rows) == 2 else ()
        got = ResultBatch(np.array(rows), pa.record_batch([batch], schema=schema), failures)
        table = result_table(schema, [got])
        with parquet.writer(STORE, f"{tmp_path}/p{len(shard.parts)}", table.schema) as file:
            file.write(table)
        w = file.written
        held = BitMap([*rows, *(f.row for f in failures)])
        shard.parts.append(PartFile(1, len(rows), w.uri, w.n_bytes, w.sha256, w.etag, held, BitMap()))
    assembled = shard.assemble(result_schema=schema, keep=())
    column = pq.read_table(assembled.written.uri).column("x")
    assert column.type == values.type
    assert [value.is_valid for value in column] == [True, False, True, True]
    assert column[0].as_py() == values[1].as_py() == column[2].as_py()
    assert column[3].as_py() == values[0].as_py()
    assert list(assembled.failed) == [1]


def test_an_engine_with_other_columns_is_refused() -> None:
    batch = pa.record_batch([pa.array([1])], names=["other"])
    with pytest.raises(RowmillError, match="other: int64"):
        result_table(SCHEMA, [ResultBatch(np.array([0]), batch)])


# -- assembling


@settings(max_examples=examples(50), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_into_parts_gives_the_rows_in_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, 120))
    shard = Shard(tmp_path_factory.mktemp("shard"), n)
    pieces = data.draw(st.integers(1, 6))
    of = data.draw(st.lists(st.sets(st.integers(0, pieces - 1), min_size=1), min_size=n, max_size=n))
    bad = data.draw(st.sets(st.integers(0, n - 1)))
    shuffle = random.Random(data.draw(st.integers()))
    expected: dict[int, str] = {}
    for piece in range(pieces):
        mine = {
            r: FAILED if (r in bad and piece == max(of[r])) else f"{r} by {piece}" for r in range(n) if piece in of[r]
        }
        if not mine:
            continue
        items = list(mine.items())
        shuffle.shuffle(items)
        half = len(items) // 2
        shard.flush(dict(items[:half]), dict(items[half:]))
        expected |= mine
    keep = data.draw(st.sampled_from([("id", "text"), ("text",), ()]))
    batch_rows = data.draw(st.integers(1, 40))
    assembled = shard.assemble(keep=keep, batch_rows=batch_rows, batch_bytes=data.draw(st.integers(1, 2**20)))
    assert assembled.n_rows == n and assembled.missing == ()
    assert set(assembled.failed) == bad and assembled.n_failed == len(bad)
    names = [*keep, "output", "tokens", "error"]
    assert output(shard) == [{k: row(r, expected[r])[k] for k in names} for r in range(n)]
    STORE.verify(assembled.written)


def test_the_next_shard_reads_on_where_this_one_ended(tmp_path: Path) -> None:
    shard = Shard(tmp_path, 30)
    shard.flush(dict.fromkeys(range(30), "text"))
    shard.assemble()
    last = shard.sources[1]
    left = (last.uri, last.etag, ("id", "text"), ("int64", "string"), 16, 2**20)
    reader = STORE.open_readers.take(left, 20)
    assert reader is not None, "the row group is not decoded from its start again"
    reader.close()


def test_prefix_and_no_kept_columns(tmp_path: Path) -> None:
    shard = Shard(tmp_path, 2)
    shard.flush({0: "a", 1: FAILED})
    for source in shard.sources.values():
        Path(source.uri).unlink()
    shard.assemble(prefix="m_", keep=())
    assert output(shard)[0] == {"m_output": "a", "m_tokens": 0, "error": None}


def test_a_missing_row_is_refused_unless_partial(tmp_path: Path) -> None:
    shard = Shard(tmp_path, 10)
    shard.flush({1: "a", 2: FAILED, 6: "b"})
    with pytest.raises(CorruptFile, match="rows 0 to 0"):
        shard.assemble()
    assert not (tmp_path / "output.parquet").exists()
    assembled = shard.assemble(partial=True)
    assert assembled.missing == ((0, 1), (3, 6), (7, 10))
    assert (assembled.n_rows, assembled.n_failed, list(assembled.failed)) == (3, 1, [2])
    assert output(shard) == [row(1, "a"), row(2, FAILED), row(6, "b")]


def test_nothing_at_all_is_an_empty_file(tmp_path: Path) -> None:
    shard = Shard(tmp_path, 3)
    assembled = shard.assemble(partial=True)
    assert (assembled.n_rows, assembled.missing) == (0, ((0, 3),))
    assert pq.read_schema(tmp_path / "output.parquet").names == ["id", "text", "output", "tokens", "error"]


@pytest.mark.parametrize("partial_base", [False, True])
def test_a_retry_takes_the_other_rows_from_the_earlier_output(tmp_path: Path, partial_base: bool) -> None:
    shard = Shard(tmp_path, 40)
    first = {r: FAILED if r % 7 == 0 else f"first {r}" for r in range(40) if not (partial_base and 10 <= r < 15)}
    shard.flush(first)
    base = shard.as_base(shard.assemble("earlier", prefix="p_", partial=partial_base))
    shard.parts.clear()
    again = {r: f"second {r}" for r in range(40) if r not in first or r % 7 == 0}
    shard.flush(again, attempt_no=2)
    assembled = shard.assemble(base=base, prefix="p_")
    got = [(r["id"], r["p_output"], r["error"]) for r in output(shard)]
    assert got == [(r, (first | again)[r], None) for r in range(40)]
    assert assembled.n_failed == 0


def test_the_result_schema_is_read_back(tmp_path: Path) -> None:
    shard = Shard(tmp_path, 3)
    part = shard.flush({0: "a", 1: "b", 2: "c"})
    base = shard.as_base(shard.assemble(prefix="p_"))
    assert assembly.stored_result_schema(STORE, [part], base, ("id", "text"), "p_") == SCHEMA
    assert assembly.stored_result_schema(STORE, [], base, ("id", "text"), "p_") == SCHEMA
    with pytest.raises(CorruptFile):
        assembly.stored_result_schema(STORE, [], None, (), "")


# -- damage


def test_damaged_lost_and_swapped_parts_are_found(tmp_path: Path) -> None:
    shard = Shard(tmp_path, 6)
    part = shard.flush({0: "a", 1: "b", 2: "c"})
    other = shard.flush({3: "d", 4: "e", 5: "f"})
    content = Path(part.uri).read_bytes()

    Path(part.uri).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFile, match="part-0"):
        shard.assemble()
    Path(part.uri).write_bytes(content[:100])
    with pytest.raises(CorruptFile, match="part-0"):
        shard.assemble()
    Path(part.uri).unlink()
    with pytest.raises(CorruptFile, match="gone"):
        shard.assemble()

    swapped = replace(part, uri=other.uri, n_bytes=other.n_bytes, sha256=other.sha256)
    with pytest.raises(CorruptFile, match="does not hold the rows"):
        shard.assemble(parts=[swapped, other])
    with pytest.raises(CorruptFile, match="claims to hold row 9"):
        shard.assemble(parts=[replace(other, rows=BitMap([9]))])
    with pytest.raises(CorruptFile, match="3 rows; 4 were flushed"):
        shard.assemble(parts=[replace(other, rows=BitMap([2, 3, 4, 5]))], partial=True)
    assert not (tmp_path / "output.parquet").exists()


def test_large_parts_are_verified_before_they_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "_WHOLE_BYTES", 10)
    shard = Shard(tmp_path, 3)
    part = shard.flush({0: "a", 1: "b", 2: "c"})
    shard.assemble()
    assert hashlib.sha256(Path(part.uri).read_bytes()).hexdigest() == part.sha256
    with pytest.raises(CorruptFile, match="SHA-256"):
        shard.assemble(parts=[replace(part, sha256="0" * 64)])


# -- memory


def test_parts_are_opened_when_they_are_reached_and_closed_when_they_are_done() -> None:
    schema = pa.schema([pa.field("x", pa.int64())])
    events: list[str] = []

    def batches(name: str, rows: Sequence[int]) -> Iterator[tuple[Any, pa.RecordBatch]]:
        events.append(f"open {name}")
        for at in range(0, len(rows), 2):
            chunk = np.array(rows[at : at + 2], dtype=np.int64)
            yield chunk, pa.record_batch([pa.array(chunk * 10)], schema=schema)
        events.append(f"close {name}")

    spans = {"a": range(10), "c": range(20, 30), "b": range(10, 20)}
    runs = [Run(name, BitMap(rows), batches(name, rows)) for name, rows in spans.items()]
    seen: list[int] = []
    for rows, table in merge.merge(runs, schema):
        assert len(rows) <= 2
        assert table.column("x").to_pylist() == [int(r) * 10 for r in rows]
        seen += [int(r) for r in rows]
        if seen[-1] == 15:
            assert events == ["open a", "close a", "open b"]
    assert seen == list(range(30))
    assert events == [f"{what} {name}" for name in "abc" for what in ("open", "close")]


def test_interleaved_parts_hold_one_batch_each() -> None:
    schema = pa.schema([pa.field("x", pa.int64())])
    drawn = dict.fromkeys(range(5), 0)

    def batches(lane: int) -> Iterator[tuple[Any, pa.RecordBatch]]:
        for at in range(lane, 1000, 50):
            drawn[lane] = at
            chunk = np.arange(at, at + 50, 5, dtype=np.int64)
            yield chunk, pa.record_batch([pa.array(chunk)], schema=schema)

    runs = [Run(str(lane), BitMap(range(lane, 1000, 5)), batches(lane)) for lane in range(5)]
    at = 0
    for rows, table in merge.merge(runs, schema):
        assert rows.tolist() == list(range(at, at + len(rows))) == table.column("x").to_pylist()
        assert max(drawn.values()) <= at + 100
        at += len(rows)
    assert at == 1000
