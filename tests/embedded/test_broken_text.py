"""Text that is not UTF-8 is the error of its row, whether the column is read, kept or both, and whatever its type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from storage.errors import InvalidInput, JobFailed

RAW = pa.array([b"fine", b"caf\xe9", b"good"]).view(pa.string())
COLUMNS: Mapping[str, Any] = {
    "string": RAW,
    "dictionary": pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int8()), RAW),
    "list": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), RAW),
    "struct": pa.StructArray.from_arrays([RAW], ["t"]),
}
IN_IPC: Mapping[str, Any] = COLUMNS | {
    "list of dictionaries": pa.ListArray.from_arrays(COLUMNS["list"].offsets, COLUMNS["dictionary"]),
    "map": pa.MapArray.from_arrays([0, 1, 2, 3], RAW, pa.array([1, 2, 3])),
    "list view": pa.ListViewArray.from_arrays([0, 1, 2], [1, 1, 1], RAW),
    "json": pa.ExtensionArray.from_storage(pa.json_(), RAW),
}


def run(client: Client, path: Path, **more: Any) -> pa.Table:
    fields = {"input": str(path), "output": str(path.parent / "out"), "model": "fake", "task": "generate"}
    job = client.submit(**(fields | more))
    job.wait()
    table = job.table()
    table.validate(full=True)
    assert job.status().rows_failed == table.num_rows - table["error"].null_count
    return table


@pytest.mark.parametrize("order", ["input", "prefix"])
@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("kind", list(COLUMNS))
def test_the_cell_is_null_and_the_row_has_its_error(
    client: Client, tmp_path: Path, kind: str, order: str, *, read: bool
) -> None:
    column = COLUMNS[kind]
    pq.write_table(pa.table({"id": [1, 2, 3], "v": column}), tmp_path / "in.parquet", store_schema=kind != "string")
    table = run(client, tmp_path / "in.parquet", prompt="{id} {v}" if read else "{id}", order=order)
    assert table["v"].is_valid().to_pylist() == [True, False, True]
    assert [error and error["code"] for error in table["error"].to_pylist()] == [None, "invalid_utf8", None]
    assert table["output"].is_valid().to_pylist() == [True, False, True]


@pytest.mark.parametrize("kind", list(IN_IPC))
def test_arrow_ipc(client: Client, tmp_path: Path, kind: str) -> None:
    rows = pa.table({"id": [1, 2, 3], "v": IN_IPC[kind]})
    with pa.ipc.new_stream(str(tmp_path / "in.arrow"), rows.schema) as stream:
        stream.write_table(rows)
    table = run(client, tmp_path / "in.arrow", prompt="{id}")
    assert table["v"].is_valid().to_pylist() == [True, False, True]
    assert [error and error["code"] for error in table["error"].to_pylist()] == [None, "invalid_utf8", None]


@pytest.mark.parametrize("order", ["input", "prefix"])
@pytest.mark.parametrize("read", [True, False])
def test_such_rows_count_against_the_failed_rows_that_a_job_may_have(
    client: Client, tmp_path: Path, order: str, *, read: bool
) -> None:
    """Also where nobody reads the column, and it shows only when the output is written."""
    pq.write_table(pa.table({"id": [1, 2, 3], "v": RAW}), tmp_path / "in.parquet")
    more = {"prompt": "{id} {v}" if read else "{id}", "order": order}
    with pytest.raises(JobFailed, match="1 rows failed, max_failed_rows allows 0"):
        run(client, tmp_path / "in.parquet", max_failed_rows=0, **more)
    table = run(client, tmp_path / "in.parquet", max_failed_rows=1, output=str(tmp_path / "enough"), **more)
    assert table.num_rows == 3


def test_a_column_that_nobody_reads_or_keeps_does_not_matter(client: Client, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3], "v": RAW}), tmp_path / "in.parquet")
    table = run(client, tmp_path / "in.parquet", prompt="{id}", keep_columns=["id"])
    assert table["error"].null_count == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.csv", b"id,v\n1,fine\n2,caf\xe9\n3,good\n"),
        ("in.jsonl", b'{"id":1,"v":"fine"}\n{"id":2,"v":"caf\xe9"}\n{"id":3,"v":"good"}\n'),
        ("in.jsonl", b'{"id":1,"v":"fine"}\n{"id":2,"v":"half \\ud83d"}\n{"id":3,"v":"good"}\n'),
        ("in.jsonl", b'{"id":1,"v":["fine"]}\n{"id":2,"v":"caf\xe9"}\n{"id":3,"v":1}\n'),
    ],
    ids=["csv", "jsonl", "surrogate", "varying"],
)
@pytest.mark.parametrize("read", [True, False])
def test_text_files(client: Client, tmp_path: Path, name: str, content: bytes, *, read: bool) -> None:
    (tmp_path / name).write_bytes(content)
    table = run(client, tmp_path / name, prompt="{v}" if read else "{id}")
    assert table["v"].is_valid().to_pylist() == [True, False, True]
    assert [error and error["code"] for error in table["error"].to_pylist()] == [None, "invalid_utf8", None]


def test_with_its_encoding_it_is_text(client: Client, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"id,v\n1,caf\xe9\n")
    assert run(client, tmp_path / "in.csv", prompt="{v}", encoding="latin-1")["v"].to_pylist() == ["café"]


def test_a_name_that_only_looks_the_same_is_named(client: Client, tmp_path: Path) -> None:
    pq.write_table(pa.table({"caf\u00e9": ["x"]}), tmp_path / "in.parquet")
    with pytest.raises(InvalidInput, match=r"cafe\\u0301.*only looks the same.*normal form"):
        run(client, tmp_path / "in.parquet", prompt="{cafe\u0301}")


@pytest.mark.parametrize(("prompt", "keep"), [("{x}", ["a"]), ("{a}", ["x"]), ("{a}", None)])
def test_two_columns_of_a_name_are_refused_where_they_are_used(
    client: Client, tmp_path: Path, prompt: str, keep: list[str] | None
) -> None:
    pq.write_table(pa.table([pa.array([1])] * 3, names=["a", "x", "x"]), tmp_path / "in.parquet")
    with pytest.raises(InvalidInput, match=r"'x' cannot be read in .*in\.parquet \(two columns have that name\)"):
        run(client, tmp_path / "in.parquet", prompt=prompt, keep_columns=keep)
    assert run(client, tmp_path / "in.parquet", prompt="{a}", keep_columns=["a"])["a"].to_pylist() == [1]
