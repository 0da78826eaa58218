"""What a job reads: found, converted where need be, and under one schema; refused with file, line and reason."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inputs import convert, csv_types
from pipeline.inputs import jsonl as jsonl_input
from pipeline.inputs.discovery import Inputs, discover
from storage.errors import InvalidInput
from storage.objects.store import ObjectStore
from storage.parquet import parquet
from storage.records import Slice
from tests.conftest import S3

STORE = ObjectStore()


@dataclass(frozen=True)
class Spec:
    input: tuple[str, ...]
    output: str
    encoding: str | None = None
    csv_delimiter: str | None = None
    request_column: str | None = None
    csv_types: str = "auto"
    csv_schema: Mapping[str, str] = field(default_factory=dict)
    wanted_columns: frozenset[str] | None = None


def find(tmp_path: Path, *patterns: str, output: str = "", store: ObjectStore = STORE, **options: Any) -> Inputs:
    paths = tuple(p if "://" in p else str(tmp_path / p) for p in patterns)
    spec = Spec(paths, output or str(tmp_path / "out"), **options)
    return discover(store, spec, f"{spec.output}/.rowmill/job/")


def rows_of(found: Inputs, store: ObjectStore = STORE) -> list[dict[str, Any]]:
    batches = parquet.read(
        store,
        {s.idx: s for s in found.sources},
        [Slice(s.idx, 0, s.n_rows) for s in found.sources],
        schema=found.schema,
        columns=found.schema.names,
        only=None,
        batch_rows=1000,
        batch_bytes=2**24,
    )
    return [row for _, batch in batches for row in batch.to_pylist()]


def put(path: Path, columns: Mapping[str, Any] | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns or {"a": [1]}), path, **options)
    return path


def types(found: Inputs) -> dict[str, str]:
    return {field.name: str(field.type) for field in found.schema}


# -- Parquet


def test_one_file(tmp_path: Path) -> None:
    path = put(tmp_path / "in.parquet", {"a": range(25)}, row_group_size=10)
    found = find(tmp_path, "in.parquet")
    info = STORE.info(str(path))
    [source] = found.sources
    assert (source.idx, source.uri, source.etag, source.n_bytes, source.n_rows) == (
        0,
        str(path),
        info.etag,
        info.n_bytes,
        25,
    )
    assert [rows for rows, _ in found.files[0].row_groups] == [10, 10, 5]
    assert not (tmp_path / "out").exists(), "Parquet is read where it is"


def test_order_is_as_given_then_by_name(tmp_path: Path) -> None:
    for name in ("b/2", "b/10", "a/1", "c"):
        put(tmp_path / f"{name}.parquet", {"a": [name]})
    found = find(tmp_path, "c.parquet", "b", "a/*.parquet")
    assert [row["a"] for row in rows_of(found)] == ["c", "b/10", "b/2", "a/1"]
    assert [source.idx for source in found.sources] == [0, 1, 2, 3] == [file.source for file in found.files]


def test_bookkeeping_files_are_not_rows(tmp_path: Path) -> None:
    put(tmp_path / "in/a.parquet")
    put(tmp_path / "in/_temporary/b.parquet")
    put(tmp_path / "in/.c.parquet")
    (tmp_path / "in/_SUCCESS").write_bytes(b"")
    assert len(find(tmp_path, "in").sources) == 1


def test_files_that_are_evidently_no_data_are_passed_over_and_named(tmp_path: Path) -> None:
    put(tmp_path / "in/a.parquet")
    for name in ("readme.txt", "schema.html", "part-0.parquet.crc", "LICENSE.md"):
        (tmp_path / "in" / name).write_text("hello")
    for pattern in ("in", "in/*"):
        heard: list[str] = []
        found = discover(
            STORE, Spec((str(tmp_path / pattern),), str(tmp_path / "out")), str(tmp_path / "w"), heard.append
        )
        assert [source.uri for source in found.sources] == [str(tmp_path / "in/a.parquet")]
        [message] = heard
        assert message.count(", /") == 2 and message.endswith("and 1 more")
    with pytest.raises(InvalidInput, match=r"cannot tell the format of .*readme\.txt"):
        find(tmp_path, "in/readme.txt")
    with pytest.raises(InvalidInput, match="cannot tell the format of"):
        find(tmp_path, "in/*.txt")


@pytest.mark.parametrize("name", ["b.orc", "b.avro", "b.parquet.gz", "b.csv.bz2", "b.parquet.tmp", "b"])
def test_files_that_may_hold_rows_are_never_passed_over(tmp_path: Path, name: str) -> None:
    put(tmp_path / "in/a.parquet")
    (tmp_path / "in" / name).write_text("hello")
    with pytest.raises(InvalidInput, match=name):
        find(tmp_path, "in")


def test_files_without_a_suffix_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    put(tmp_path / "warehouse/000000_0")
    assert len(find(tmp_path, "warehouse").sources) == 1
    (tmp_path / "warehouse/notes").write_text("hello")
    with pytest.raises(InvalidInput, match=r"cannot tell the format of .*notes"):
        find(tmp_path, "warehouse")


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("a.parquet.gz", "parquet"), ("a.csv", "parquet"), ("a.jsonl", "arrow"), ("a.parquet", "arrow"),
        ("a.arrow", "parquet"), ("a.csv", "csv.gz"), ("a.csv.gz", "csv"), ("a.jsonl", "jsonl.zst"),
        ("a.jsonl.zst", "jsonl.gz"), ("a.csv", "csv"), ("a.feather", "stream"),
    ],
)  # fmt: skip
def test_first_bytes_go_before_names(tmp_path: Path, name: str, inner: str) -> None:
    table = pa.table({"PARENT": [1, 2]})
    kind, _, codec = inner.partition(".")
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(table, sink)
    elif kind in ("arrow", "stream"):
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        sink.write(b"PARENT\n1\n2\n" if kind == "csv" else b'{"PARENT": 1}\n{"PARENT": 2}\n')
    content = sink.getvalue().to_pybytes()
    if codec:
        packed = pa.BufferOutputStream()
        with pa.CompressedOutputStream(packed, {"gz": "gzip", "zst": "zstd"}[codec]) as stream:
            stream.write(content)
        content = packed.getvalue().to_pybytes()
    (tmp_path / name).write_bytes(content)
    assert rows_of(find(tmp_path, name)) == [{"PARENT": 1}, {"PARENT": 2}]


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("a.csv", b"PK\x03\x04", "zip archive"),
        ("a.jsonl", b"BZh91AY&SY", "bzip2"),
        ("a", b"\xfd7zXZ\x00", "compressed with xz"),
        ("a.csv", b"SQLite format 3\x00", "SQLite"),
    ],
)
def test_other_formats_are_named_by_their_first_bytes(tmp_path: Path, name: str, head: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(head + bytes(100))
    with pytest.raises(InvalidInput, match=message):
        find(tmp_path, name)


@pytest.mark.parametrize(
    ("link", "target", "pattern"),
    [
        ("a.parquet", "gone.parquet", "a.parquet"),
        ("in/b.parquet", "gone.parquet", "in"),
        ("in/b.parquet", "gone.parquet", "in/*.parquet"),
        ("in/k=b", "gone", "in"),
        ("in/k=b", "gone", "in/*/*.parquet"),
        ("in/k=b", "gone", "in/**/*.parquet"),
        ("in/k=b", "k=b", "in"),
        ("in/k=b", "k=b", "in/*/*.parquet"),
        ("folder", "gone", "folder/in/*.parquet"),
    ],
)
def test_links_that_lead_nowhere_are_named(tmp_path: Path, link: str, target: str, pattern: str) -> None:
    put(tmp_path / "in/a.parquet")
    put(tmp_path / "in/k=a/a.parquet")
    (tmp_path / link).symlink_to(target)
    with pytest.raises(InvalidInput, match=f"{tmp_path / link} is a symbolic link to {target}, which leads nowhere"):
        find(tmp_path, pattern)


def test_brackets_in_a_name_have_a_hint_that_works(tmp_path: Path) -> None:
    put(tmp_path / "x [id]/a.parquet")
    assert len(find(tmp_path, "x [id]").sources) == 1
    with pytest.raises(InvalidInput, match="brackets stand for one character") as caught:
        find(tmp_path, "x [id]/*.parquet")
    assert len(find(tmp_path, str(caught.value).split(" write ")[1]).sources) == 1


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("nothing",), "no file matches .*nothing"),
        (("no/*.parquet",), "no file matches"),
        (("in", "in/a.parquet"), r"a\.parquet is in the input twice"),
        (("mixed",), r"mixed mixes formats: .*a\.jsonl is JSONL, .*b\.parquet is Parquet"),
        (("bad.parquet",), r"bad\.parquet: it is not a readable Parquet file"),
        (("x.parquet.gz",), "compressed as a whole"),
    ],
)
def test_refusals(tmp_path: Path, patterns: Sequence[str], message: str) -> None:
    put(tmp_path / "in/a.parquet")
    put(tmp_path / "mixed/b.parquet")
    (tmp_path / "mixed/a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    (tmp_path / "x.parquet.gz").write_bytes(b"")
    with pytest.raises(InvalidInput, match=message):
        find(tmp_path, *patterns)


@pytest.mark.parametrize(
    ("pattern", "output"),
    [
        ("in", "in/out"),
        ("in", "in"),
        ("in/**/*.parquet", "in/out"),
        ("*", "in"),
        ("in/../in", "in/out"),
        ("in/o*", "in/out"),
        ("in/_out", "in/_out/run"),
    ],
)
def test_an_output_inside_the_input_is_refused(tmp_path: Path, pattern: str, output: str) -> None:
    put(tmp_path / "in/a.parquet")
    put(tmp_path / "in/_out/a.parquet")
    put(tmp_path / "in/out1/a.parquet")
    with pytest.raises(InvalidInput, match="lies inside the input"):
        find(tmp_path, pattern, output=str(tmp_path / output))


def test_an_output_beside_the_input_is_fine(tmp_path: Path) -> None:
    put(tmp_path / "in/a.parquet")
    put(tmp_path / "in/out/data/part-00000.parquet")
    assert len(find(tmp_path, "in/*.parquet", output=str(tmp_path / "in/out")).sources) == 1
    assert len(find(tmp_path, "in/a.parquet", output=str(tmp_path / "in")).sources) == 1
    assert len(find(tmp_path, "in", output=str(tmp_path / "in2")).sources) == 2
    with pytest.raises(InvalidInput, match="lies where the output goes"):
        find(tmp_path, "in/out/data/part-00000.parquet", output=str(tmp_path / "in/out"))


def test_an_output_reached_through_a_link_is_inside_too(tmp_path: Path) -> None:
    put(tmp_path / "in/a.parquet")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(InvalidInput, match="lies inside the input"):
        find(tmp_path, "in", output=str(tmp_path / "link/out"))


# -- one schema


def test_types_are_widened_and_missing_columns_are_null(tmp_path: Path) -> None:
    put(tmp_path / "in/1.parquet", {"a": pa.array([1], pa.int32()), "b": pa.array([None], pa.null()), "d": ["x"]})
    put(tmp_path / "in/2.parquet", {"b": ["text"], "a": [2.5], "c": [True], "d": pa.array(["y"]).dictionary_encode()})
    found = find(tmp_path, "in")
    assert types(found) == {"a": "double", "b": "string", "d": "string", "c": "bool"}
    assert rows_of(found) == [
        {"a": 1.0, "b": None, "d": "x", "c": None},
        {"a": 2.5, "b": "text", "d": "y", "c": True},
    ]


def test_a_clash_names_the_column_and_both_files(tmp_path: Path) -> None:
    put(tmp_path / "in/1.parquet", {"x": [1]})
    put(tmp_path / "in/2.parquet", {"x": [2]})
    put(tmp_path / "in/3.parquet", {"x": ["three"]})
    why = find(tmp_path, "in").clashes["x"]
    assert re.search(r"column 'x' is int64 in .*1\.parquet and string in .*3\.parquet", why)


def test_required_columns_may_be_null_in_a_job(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("a", pa.int64(), nullable=False)])
    pq.write_table(pa.table({"a": [1]}, schema=schema), tmp_path / "1.parquet")
    put(tmp_path / "2.parquet", {"b": [2]})
    assert rows_of(find(tmp_path, "1.parquet", "2.parquet")) == [{"a": 1, "b": None}, {"a": None, "b": 2}]


def test_zero_rows(tmp_path: Path) -> None:
    put(tmp_path / "in.parquet", {"a": pa.array([], pa.string())})
    found = find(tmp_path, "in.parquet")
    assert types(found) == {"a": "string"} and found.sources[0].n_rows == 0


# -- hive partitions


@pytest.mark.parametrize(
    "values",
    [
        ("1", "2"),
        ("3000000000", "1"),
        ("a", "1"),
        ("__HIVE_DEFAULT_PARTITION__", "2"),
        ("a%20b", "c"),
        ("1.5", "-4"),
    ],
)
def test_partition_types_are_those_of_pyarrow(tmp_path: Path, values: tuple[str, str]) -> None:
    for value in values:
        put(tmp_path / f"in/k={value}/f.parquet")
    theirs = ds.dataset(tmp_path / "in", partitioning="hive")
    found = find(tmp_path, "in")
    assert found.schema.field("k").type == theirs.schema.field("k").type
    assert [row["k"] for row in rows_of(found)] == theirs.to_table().column("k").to_pylist()


@pytest.mark.parametrize("values", [("01", "12"), ("01234", "98765"), ("-0", "1"), ("+1", "2"), ("1", "002")])
def test_partition_values_that_are_not_written_as_numbers_are_text(tmp_path: Path, values: tuple[str, str]) -> None:
    for value in values:
        put(tmp_path / f"in/k={value}/f.parquet")
    assert sorted(row["k"] for row in rows_of(find(tmp_path, "in"))) == sorted(values)


def test_partitions_count_from_the_first_wildcard(tmp_path: Path) -> None:
    put(tmp_path / "in/year=2024/lang=de/f.parquet")
    put(tmp_path / "in/year=2025/f.parquet")
    assert types(find(tmp_path, "in")) == {"a": "int64", "year": "int32", "lang": "string"}
    assert rows_of(find(tmp_path, "in"))[1] == {"a": 1, "year": 2025, "lang": None}
    assert types(find(tmp_path, "in/*/*.parquet")) == {"a": "int64", "year": "int32"}
    assert types(find(tmp_path, "in/year=2024/*/*.parquet")) == {"a": "int64", "lang": "string"}
    assert types(find(tmp_path, "in/year=2025/f.parquet")) == {"a": "int64"}


@pytest.mark.parametrize(
    ("glob", "columns"),
    [
        ("in/k=*/*.parquet", {"k"}),
        ("in/k=*", {"k", "m"}),
        ("in/k=*/*/a.parquet", {"k", "m"}),
        ("in/k=*/plain/*.parquet", {"k"}),
        ("in/*.parquet", set()),
    ],
)
def test_a_glob_that_the_shell_expanded_has_the_same_columns(tmp_path: Path, glob: str, columns: set[str]) -> None:
    for key in "ab":
        for name in ("p.parquet", "m=1/a.parquet", "plain/a.parquet"):
            put(tmp_path / f"in/k={key}" / name)
        put(tmp_path / f"in/{key}=1.parquet")
    whole = find(tmp_path, glob)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob(glob))
    expanded = find(tmp_path, *names)
    assert set(whole.schema.names) == set(expanded.schema.names) == {"a"} | columns
    assert rows_of(expanded) == rows_of(whole)


def test_a_column_in_the_file_wins_over_its_folder(tmp_path: Path) -> None:
    put(tmp_path / "in/a=7/f.parquet", {"a": [1]})
    found = find(tmp_path, "in")
    assert rows_of(found) == [{"a": 1}] and found.sources[0].partition == {}


# -- JSONL


def jsonl(tmp_path: Path, text: str | bytes, name: str = "in.jsonl") -> Inputs:
    path = tmp_path / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return find(tmp_path, name)


def test_jsonl_rows_in_order_with_types_over_all_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_input, "BLOCK_BYTES", 64)
    lines: list[dict[str, Any]] = [{"text": "2024-01-01", "n": i, "extra": None} for i in range(50)]
    lines += [{"text": "no date", "n": 0.5, "tags": [], "extra": {"x": 1}}, {"tags": ["a", None], "extra": {"y": "z"}}]
    found = jsonl(tmp_path, "\r\n".join(map(json.dumps, lines)) + "\n\n  \n")
    assert types(found) == {
        "text": "string",
        "n": "double",
        "extra": "struct<x: int64, y: string>",
        "tags": str(pa.list_(pa.field("element", pa.string()))),
    }
    rows = rows_of(found)
    assert [row["text"] for row in rows] == [line.get("text") for line in lines]
    assert [row["n"] for row in rows] == [line.get("n") for line in lines]
    assert rows[-1] == {"text": None, "n": None, "extra": {"x": None, "y": "z"}, "tags": ["a", None]}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('{"a": 1}\n\n{"a": 2\n{"a": 3}\n', 3, "Expecting ',' delimiter"),
        ('{"a": 1}\n[1, 2]\n', 2, "not a JSON object"),
        ('{"a": 1}\n\n"text"\n', 3, "not a JSON object"),
        ('null\n{"a": 1}\n', 1, "not a JSON object"),
        ('{"a": 1}\n null ', 2, "not a JSON object"),
        ('{"a": 1}\n{"a": 2} {"a": 3}\n', 2, "Extra data"),
        ('{"a": 1}\n{"b": 1, "b": 2}\n', 2, "specified twice"),
        ("[\n1,\n{}\n]\n", 1, "not a JSON object"),
    ],
)
@pytest.mark.parametrize("block", [8, 2**20])
def test_bad_lines_are_named(
    tmp_path: Path, text: str, line: int, reason: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl_input, "BLOCK_BYTES", block)
    with pytest.raises(InvalidInput, match=rf"in\.jsonl, line {line}: .*{reason}"):
        jsonl(tmp_path, text)
    with pytest.raises(InvalidInput, match=rf"in\.jsonl\.gz, line {line}: .*{reason}"):
        jsonl(tmp_path, text, "in.jsonl.gz")


def test_jsonl_oddities(tmp_path: Path) -> None:
    assert rows_of(jsonl(tmp_path, b'\xef\xbb\xbf{"a": "x"}')) == [{"a": "x"}]
    for nothing in ("", "\n \n"):
        with pytest.raises(InvalidInput, match=r"in\.jsonl is empty"):
            jsonl(tmp_path, nothing)
    assert types(jsonl(tmp_path, '{"a": null}\n')) == {"a": "string"}
    assert rows_of(jsonl(tmp_path, '{"a": "x"}\n', "in.ndjson.gz")) == [{"a": "x"}]
    with pytest.raises(InvalidInput, match="no columns"):
        jsonl(tmp_path, "{}\n{}\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:40])
    with pytest.raises(InvalidInput, match=r"cut\.jsonl\.gz: it cannot be decompressed"):
        find(tmp_path, "cut.jsonl.gz")


@pytest.mark.parametrize("name", ["in.json", "in.jsonl", "in.json.gz"])
def test_a_json_array_holds_rows(tmp_path: Path, name: str) -> None:
    content = json.dumps([{"a": 1, "b": "x"}, {"a": 2.5}], indent=2).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert rows_of(find(tmp_path, name)) == [{"a": 1, "b": "x"}, {"a": 2.5, "b": None}]


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_input, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(jsonl_input, "LINE_BYTES", 5000)
    with pytest.raises(InvalidInput, match="line 2: longer than"):
        jsonl(tmp_path, '{"a": "x"}\n{"a": "' + "x" * 10_000 + '"}\n')


def test_conversion_again_keeps_the_chunks_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_input, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(convert, "CHUNK_BYTES", 5000)
    text = "".join(json.dumps({"n": i, "t": "x" * 50}) + "\n" for i in range(1000))
    first = jsonl(tmp_path, text)
    assert len(first.sources) > 5
    assert [row["n"] for row in rows_of(first)] == list(range(1000))
    assert all(s.uri.startswith(str(tmp_path / "out/.rowmill/job/input/chunk-")) for s in first.sources)
    again = find(tmp_path, "in.jsonl")
    assert again.sources == first.sources, "also the etags: a job that was planned with them goes on"
    assert not list((tmp_path / "out").rglob(".*.tmp"))


def test_several_files_are_numbered_through(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"in/{name}.jsonl").write_text(json.dumps({"name": name}) + "\n")
    found = find(tmp_path, "in")
    assert [row["name"] for row in rows_of(found)] == ["a", "b"]
    assert ["chunk-00000" in found.sources[0].uri, "chunk-00001" in found.sources[1].uri] == [True, True]
    (tmp_path / "in/b.jsonl").write_text('{"name": 1}\n')
    found = find(tmp_path, "in")
    assert types(found) == {"name": "extension<arrow.json>"}
    assert [row["name"] for row in rows_of(found)] == ['"a"', "1"]


# -- CSV


def csv(tmp_path: Path, text: str | bytes, name: str = "in.csv") -> Inputs:
    data = text.encode() if isinstance(text, str) else text
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return find(tmp_path, name)


def test_csv_types_come_from_all_rows(tmp_path: Path) -> None:
    header = "i,f,b,d,t,s,late,none\n"
    line = '1,1.5,true,2024-01-01,2024-01-01 10:00:00,"a, ""quoted""\ntext",5,\n'
    last = ",-0.25,false,2024-01-02,2024-01-02 10:00:00.5,NA,x,\n"
    found = csv(tmp_path, header + line * 1000 + last)
    assert types(found) == {
        "i": "int64",
        "f": "double",
        "b": "string",
        "d": "date32[day]",
        "t": "string",
        "s": "string",
        "late": "string",
        "none": "string",
    }
    rows = rows_of(found)
    assert len(rows) == 1001
    assert rows[0]["s"] == 'a, "quoted"\ntext' and rows[0]["i"] == 1 and rows[0]["late"] == "5"
    assert rows[-1]["s"] == "NA" and rows[-1]["i"] is None and rows[-1]["late"] == "x"
    assert rows[0]["none"] == "", "an empty text is what stands there"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a,b\n1,"x\ny"\n2\n', r"line 4: 1 values, and the first line names 2 columns"),
        ("a,b\n1,2\n\n1,2,3\n", r"line 4: 3 values"),
        ("", "is empty"),
    ],
)
def test_bad_csv_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=rf"in\.csv.*{message}"):
        csv(tmp_path, text)
    with pytest.raises(InvalidInput, match=message):
        csv(tmp_path, text, "in.csv.gz")


def test_csv_oddities(tmp_path: Path) -> None:
    assert rows_of(csv(tmp_path, b"\xef\xbb\xbfname,n\nx,1\n")) == [{"name": "x", "n": 1}]
    assert rows_of(csv(tmp_path, "name,n\nx,1\n", "in.csv.gz")) == [{"name": "x", "n": 1}]
    assert rows_of(csv(tmp_path, 'text\n""\nx\n')) == [{"text": ""}, {"text": "x"}]
    empty = csv(tmp_path, "a,b\n")
    assert types(empty) == {"a": "string", "b": "string"} and empty.sources[0].n_rows == 0
    found = csv(tmp_path, b"a\n\xff\xfe\nfine\n")
    assert found.sources[0].n_rows == 2, "bytes that are not UTF-8 are the row's problem"


# -- Arrow IPC


@pytest.mark.parametrize("stream", [False, True])
def test_ipc(tmp_path: Path, stream: bool) -> None:
    table = pa.table({"a": range(100), "t": pa.array(["x", "y"] * 50).dictionary_encode()})
    opener = pa.ipc.new_stream if stream else pa.ipc.new_file
    with opener(tmp_path / "in.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    found = find(tmp_path, "in.arrow")
    assert rows_of(found) == table.to_pylist()
    content = (tmp_path / "in.arrow").read_bytes()
    (tmp_path / "in.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidInput, match=r"in\.arrow: it is "):
        find(tmp_path, "in.arrow")


# -- S3


def test_everything_on_s3(s3: S3, tmp_path: Path) -> None:
    store = ObjectStore(s3.storage_options)
    for year in (2024, 2025):
        with parquet.writer(store, s3.url(f"in/year={year}/f.parquet"), pa.schema([pa.field("a", pa.int64())])) as file:
            file.write(pa.table({"a": [year]}))
    store.put_bytes(s3.url("text/a.jsonl.gz"), gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    store.put_bytes(s3.url("text/b.csv"), b"a\n3\n")
    found = find(tmp_path, s3.url("in/*/*.parquet"), output=s3.url("out"), store=store)
    assert rows_of(found, store) == [{"a": 2024, "year": 2024}, {"a": 2025, "year": 2025}]
    found = find(tmp_path, s3.url("text/*.gz"), s3.url("text/b.csv"), output=s3.url("out"), store=store)
    assert rows_of(found, store) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert found == find(tmp_path, s3.url("text/*.gz"), s3.url("text/b.csv"), output=s3.url("out"), store=store)
    with pytest.raises(InvalidInput, match="lies inside the input"):
        find(tmp_path, s3.url("in"), output=s3.url("in/out"), store=store)
    with pytest.raises(InvalidInput, match="no file matches"):
        find(tmp_path, s3.url("none/*"), output=s3.url("out"), store=store)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["9223372036854775807", "-9223372036854775808"], "int64"),
        (["18446744073709551615", "3"], "uint64"),
        (["18446744073709551615", "null"], "uint64"),
        (["9007199254740992", "0.5"], "double"),
        (["1e30", "3"], "double"),
        (['"123456789012345678901234567890"', '"a"'], "string"),
    ],
)
@pytest.mark.parametrize("block", [8, 2**20])
def test_whole_numbers_in_jsonl_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[str], kind: str, block: int
) -> None:
    monkeypatch.setattr(jsonl_input, "BLOCK_BYTES", block)
    (tmp_path / "in.jsonl").write_text("".join(f'{{"a": {value}}}\n' for value in values))
    found = find(tmp_path, "in.jsonl")
    assert types(found) == {"a": kind}
    assert [row["a"] for row in rows_of(found)] == [json.loads(value) for value in values]


@pytest.mark.parametrize(
    "values",
    [
        ["1", "18446744073709551617"],
        ["0.5", "9007199254740993"],
        ["9007199254740993", "0.5"],
        ["-1", "18446744073709551615"],
        ['{"b": [0.5, 9007199254740993]}'],
        ["1", '"two"'],
        ["{}", "{}"],
        ['{"x": {}}', '{"x": null}'],
        ['"one"', '[{"type": "text", "text": "1.10"}]'],
        ["[1]", '{"y": 1}'],
        ["[1, [2]]", "null"],
        ["1e400", "1.10"],
        ["true", "0"],
        [f'{{"deep": {"[" * 60}{"]" * 60}}}', "null"],
    ],
)
@pytest.mark.parametrize("block", [8, 2**20])
def test_jsonl_values_without_a_type_in_common_are_json_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[str], block: int
) -> None:
    monkeypatch.setattr(jsonl_input, "BLOCK_BYTES", block)
    (tmp_path / "in.jsonl").write_text("".join(f'{{"a": "x",  "v": {value} }}\n\n' for value in values))
    found = find(tmp_path, "in.jsonl")
    assert types(found) == {"a": "string", "v": "extension<arrow.json>"}
    assert [row["v"] for row in rows_of(found)] == [None if value == "null" else value for value in values]


def test_jsonl_columns_of_all_files_have_one_type(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"n": 9007199254740993, "u": 18446744073709551615, "s": {"a": 1}}\n')
    (tmp_path / "in/b.jsonl").write_text('{"n": 0.5, "u": 1, "s": {"b": []}}\n')
    rows = rows_of(find(tmp_path, "in"))
    assert [row["n"] for row in rows] == ["9007199254740993", "0.5"]
    assert [row["u"] for row in rows] == [2**64 - 1, 1]
    assert [row["s"] for row in rows] == [{"a": 1, "b": None}, {"a": None, "b": []}]


def test_half_a_surrogate_pair_is_its_rows_problem(tmp_path: Path) -> None:
    found = jsonl(tmp_path, '{"a": "x"}\n{"a": "\\ud83d"}\n{"a": "\\ud83d\\ude00"}\n{"a": "\\\\ud83d"}\n')
    column = pq.read_table(found.sources[0].uri).column("a").cast(pa.binary()).to_pylist()
    assert column == [b"x", b"\xed\xa0\xbd", "\U0001f600".encode(), b"\\ud83d"]
    found = jsonl(tmp_path, '{"a": 1}\n{"a": "\\ud83d"}\n')
    assert [row["a"] for row in rows_of(found)] == ["1", '"\\ud83d"'], "JSON text as it stands"


# -- text that says more than its bytes

WRITTEN = [
    *(["3.10", "3.9"], ["10.50", "2.00"], ["true", "false"], ["+5", "6"], ["1e3", "2e3"], ["0x1F", "0x20"]),
    *(["-0", "1"], [".5", "0.5"], ["1.", "2.5"], ["0.12345678901234567", "0.5"], ["0.00001", "0.5"], ["1", "0.5"]),
    *(["2024-01-01T10:00:00", "2024-01-02T10:00:00"], ["2024-01-01 10:00:00", "2024-01-02 10:00:00"]),
    *(
        ["NA", "NA"],
        ["N/A", ""],
        ["nan", "nan"],
        ["null", "1"],
        ["NULL", ""],
        ["inf", "-inf"],
        [" 1", "2"],
        ["1 ", "2"],
    ),
    *(["01234", "98765"], ["99999999999999999999", "1"], ["9223372036854775808", "1"], ["2024-02-30", "2024-02-01"]),
    *(["0000-01-01", "2024-01-01"], ["24-01-01", "24-01-02"], ["12:30", "12:45"], ["1,000", "2,000"], ["1_000", "2"]),
    *(["9223372036854775807", "-9223372036854775808"], ["0.0001", "-0.0"], ["123456789012.5", "1.0"], ["", "x"]),
]


@pytest.mark.parametrize("values", WRITTEN, ids=" ".join)
def test_a_csv_value_is_written_again_as_it_stands(tmp_path: Path, values: list[str]) -> None:
    found = csv(tmp_path, "k,v\n" + "".join(f'r,"{value}"\n' for value in values))
    assert [str(row["v"]) for row in rows_of(found)] == values


@given(st.lists(st.floats(allow_nan=False).map(repr) | st.integers().map(str) | st.dates().map(str), min_size=1))
def test_what_a_csv_column_is_read_as_says_the_same(texts: list[str]) -> None:
    column = pa.array(texts)
    for kind in csv_types.CANDIDATES:
        if csv_types.comes_back(column, kind):
            assert [str(value) for value in csv_types.parsed(column, kind).to_pylist()] == texts


def test_csv_types_are_those_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.csv").write_text("zip,n\n98765,1\n")
    (tmp_path / "in/b.csv").write_text("n,zip\n,01234\n")
    assert rows_of(find(tmp_path, "in")) == [{"zip": "98765", "n": 1}, {"zip": "01234", "n": None}]


def test_empty_csv_values(tmp_path: Path) -> None:
    found = csv(tmp_path, 'n,q,t\n1,1,x\n,"",\n2,2,""\n')
    assert types(found) == {"n": "int64", "q": "string", "t": "string"}, "a number is not written as quotes"
    assert [tuple(row.values()) for row in rows_of(found)] == [(1, "1", "x"), (None, "", ""), (2, "2", "")]


def test_csv_types_that_the_job_names(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("a,b,c,d\n1,1.10,true,2024-01-01T10:00:00\n")
    given = {"a": "double", "b": "decimal(9,2)", "c": "bool", "d": "timestamp"}
    [row] = rows_of(find(tmp_path, "in.csv", csv_schema=given))
    assert row == {"a": 1.0, "b": Decimal("1.10"), "c": True, "d": datetime(2024, 1, 1, 10)}
    assert rows_of(find(tmp_path, "in.csv", csv_types="text"))[0]["a"] == "1"
    with pytest.raises(InvalidInput, match=r"csv_schema: .*row 1 .*'2024-01-01T10:00:00' in column 'd' is no int64"):
        find(tmp_path, "in.csv", csv_schema={"d": "int64"})
    with pytest.raises(InvalidInput, match="csv_schema: no CSV has a column 'e'"):
        find(tmp_path, "in.csv", csv_schema={"e": "int64"})


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_another_delimiter_is_named_or_given(tmp_path: Path, delimiter: str) -> None:
    (tmp_path / "in.csv").write_text(f"a{delimiter}b\nx,y{delimiter}1\n")
    with pytest.raises(InvalidInput, match="--csv-delimiter"):
        find(tmp_path, "in.csv")
    assert rows_of(find(tmp_path, "in.csv", csv_delimiter=delimiter)) == [{"a": "x,y", "b": 1}]
    (tmp_path / "in.csv").write_text("a;b\nx\n")
    assert rows_of(find(tmp_path, "in.csv", csv_delimiter=",")) == [{"a;b": "x"}]


def test_tabs_separate_what_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "in.tsv").write_text("a\tb\nx,y\t1\n")
    assert rows_of(find(tmp_path, "in.tsv")) == [{"a": "x,y", "b": 1}]
    (tmp_path / "in.tsv").write_text("a,b\nx,1\n")
    with pytest.raises(InvalidInput, match="--csv-delimiter ','"):
        find(tmp_path, "in.tsv")
    assert rows_of(find(tmp_path, "in.tsv", csv_delimiter=",")) == [{"a": "x", "b": 1}]


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl", "in.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp1252"])
@pytest.mark.parametrize("marked", [False, True])
def test_encodings(tmp_path: Path, name: str, encoding: str, *, marked: bool) -> None:
    text = "text,n\ncafé,1\n" if ".csv" in name else '{"text":"café","n":1}\n'
    data = (("\ufeff" if marked and "utf-16-" in encoding else "") + text).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert rows_of(find(tmp_path, name, encoding=encoding)) == [{"text": "café", "n": 1}]
    if marked or encoding in ("utf-16", "utf-32", "utf-8-sig"):
        if encoding.startswith("utf"):
            assert rows_of(find(tmp_path, name)) == [{"text": "café", "n": 1}], "the byte order mark tells"
    elif encoding.startswith("utf"):
        with pytest.raises(InvalidInput, match=f"(?i)encoding: .*{encoding}.*--encoding"):
            find(tmp_path, name)


def test_an_encoding_that_is_not_the_files(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"a\n" + b"x" * 5000 + b"\xff\n")
    with pytest.raises(InvalidInput, match=r"encoding: .*in\.csv is not ascii .*--encoding"):
        find(tmp_path, "in.csv", encoding="ascii")
    (tmp_path / "in.csv").write_bytes("né\n1\n".encode("latin-1"))
    with pytest.raises(InvalidInput, match=r"encoding: .*line 1: .*is not UTF-8.*--encoding"):
        find(tmp_path, "in.csv")


@pytest.mark.parametrize("option", [{"encoding": "latin-1"}, {"csv_types": "text"}, {"csv_delimiter": ";"}])
def test_options_that_no_file_follows_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    put(tmp_path / "in.parquet")
    with pytest.raises(InvalidInput, match=f"{next(iter(option))}: it is for CSV"):
        find(tmp_path, "in.parquet", **option)


# -- columns that nobody asked for


def test_only_wanted_columns_are_converted(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text,id,id\na,1,2\n")
    (tmp_path / "in.jsonl").write_text('{"text": "a", "v": 1, "v": 2}\n{"text": "b", "v": "x"}\n')
    table = pa.table({"text": ["a"], "gap": pa.array([(1, 2, 3)], pa.month_day_nano_interval()), "id": [1]})
    with pa.ipc.new_file(tmp_path / "in.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("in.csv", "in.jsonl", "in.arrow"):
        found = find(tmp_path, name, wanted_columns=frozenset({"text"}))
        assert pq.read_schema(found.sources[0].uri).names == ["text"]
        assert set(found.unreadable) == set(found.schema.names) - {"text"}


def test_columns_that_cannot_be_read_are_told_with_the_reason(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array([1]), pa.array(["x"])], names=["x", "x"]), tmp_path / "twice.parquet")
    assert "two columns" in find(tmp_path, "twice.parquet").unreadable["x"]
    (tmp_path / "twice.csv").write_text("a,x,x\n1,2,3\n")
    found = find(tmp_path, "twice.csv")
    assert "two columns" in found.unreadable["x"] and found.sources[0].n_rows == 1
    gap = pa.table({"gap": pa.array([(1, 2, 3)], pa.month_day_nano_interval()), "a": [1]})
    with pa.ipc.new_stream(tmp_path / "in.arrow", gap.schema) as writer:
        writer.write_table(gap)
    assert "interval" in find(tmp_path, "in.arrow").unreadable["gap"]


RUNS = pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["x"]))
GAP = pa.array([(1, 2, 3)], pa.month_day_nano_interval())


@pytest.mark.parametrize(
    "column",
    [
        pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]),
        pa.UnionArray.from_dense(pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array(["x"])]),
        pa.ListArray.from_arrays([0, 1], RUNS),
        pa.StructArray.from_arrays([GAP], ["a"]),
    ],
    ids=lambda column: str(column.type)[:20],
)
def test_columns_that_parquet_cannot_hold_do_not_matter_unless_wanted(tmp_path: Path, column: Any) -> None:
    rows = pa.table({"text": ["a"], "v": column})
    with pa.ipc.new_file(tmp_path / "in.arrow", rows.schema) as writer:
        writer.write_table(rows)
    assert "which Parquet does not have" in find(tmp_path, "in.arrow").unreadable["v"]
    found = find(tmp_path, "in.arrow", wanted_columns=frozenset({"text"}))
    assert pq.read_table(found.sources[0].uri).to_pylist() == [{"text": "a"}]


def test_run_ends_are_decoded(tmp_path: Path) -> None:
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["x", "y"]))
    with pa.ipc.new_file(tmp_path / "in.arrow", pa.schema([pa.field("r", runs.type)])) as writer:
        writer.write_batch(pa.record_batch([runs], names=["r"]))
    assert rows_of(find(tmp_path, "in.arrow")) == [{"r": "x"}, {"r": "x"}, {"r": "y"}]
