"""Delta, Iceberg and Hudi tables as inputs: the current snapshot and nothing else, or a refusal that names them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog.memory import InMemoryCatalog

from pipeline.inputs.convert import Converter
from pipeline.inputs.formats import Format, Kind
from pipeline.spec.text_options import TextOptions
from storage.errors import InvalidInput
from storage.objects.store import ObjectInfo, ObjectStore
from tests.conftest import S3
from tests.inputs.test_discovery import STORE, find, put, rows_of

ROWS = pa.table({"id": [1, 2, 3], "k": ["01", "02", "01"], "at": pa.array([0, 1, 2], pa.timestamp("us", "UTC"))})


def delta(folder: Path) -> Path:
    write_deltalake(folder, ROWS.slice(0, 1), partition_by=["k"])
    write_deltalake(folder, ROWS, mode="overwrite")
    DeltaTable(folder).delete("id = 2")
    return folder


def iceberg(folder: Path) -> Path:
    catalog = InMemoryCatalog("c", warehouse=str(folder.parent))
    catalog.create_namespace("n")
    table = catalog.create_table("n.t", schema=ROWS.schema, location=str(folder))
    table.append(ROWS.slice(0, 1))
    table.overwrite(ROWS)
    table.delete("id = 2")
    return folder


def ids(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return sorted((row["id"], row["k"]) for row in rows)


@pytest.mark.parametrize("make", [delta, iceberg])
def test_the_current_snapshot_is_read_with_its_types(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "t")
    found = find(tmp_path, "t")
    assert ids(rows_of(found)) == [(1, "01"), (3, "01")]
    assert found.schema.field("at").type == pa.timestamp("us", "UTC")
    [(uri, version)] = found.originals
    assert uri == str(tmp_path / "t") and version
    assert rows_of(find(tmp_path, "t")) == rows_of(found)


def test_a_kind_without_a_reader_is_not_read_as_another(tmp_path: Path) -> None:
    converter = Converter(STORE, TextOptions(), str(tmp_path / "work"))
    with pytest.raises(AssertionError, match="Apache Hudi has no reader"):
        converter.convert(ObjectInfo(str(tmp_path / "t"), 1, "etag"), Format(Kind.HUDI), 0)


def test_another_version_is_another_input(tmp_path: Path) -> None:
    before = find(tmp_path, str(delta(tmp_path / "t"))).originals
    write_deltalake(tmp_path / "t", ROWS.slice(1, 1), mode="append")
    found = find(tmp_path, "t")
    assert ids(rows_of(found)) == [(1, "01"), (2, "02"), (3, "01")] and found.originals != before


@pytest.mark.parametrize("pattern", ["t/**/*.parquet", "t/*/*.parquet", "t/k=01", "t/k=*", ".", "*"])
def test_files_of_a_table_are_not_read_one_by_one(tmp_path: Path, pattern: str) -> None:
    delta(tmp_path / "in/t")
    with pytest.raises(InvalidInput, match=r"in/t is a table of Delta Lake, .*give the folder itself"):
        find(tmp_path / "in", pattern, output=str(tmp_path / "out"))
    file = next((tmp_path / "in/t").rglob("*.parquet"))
    with pytest.raises(InvalidInput, match="table of Delta Lake"):
        find(tmp_path, str(file))


def test_data_files_of_iceberg_are_not_read_one_by_one(tmp_path: Path) -> None:
    iceberg(tmp_path / "t")
    for pattern in ("t/data", "t/data/*.parquet"):
        with pytest.raises(InvalidInput, match="t is a table of Apache Iceberg"):
            find(tmp_path, pattern)


def test_hudi_is_named(tmp_path: Path) -> None:
    put(tmp_path / "t/a.parquet")
    (tmp_path / "t/.hoodie").mkdir()
    for pattern in ("t", "t/*.parquet"):
        with pytest.raises(InvalidInput, match="table of Apache Hudi"):
            find(tmp_path, pattern)


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_without_the_library_the_extra_is_named(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    {"delta": delta, "iceberg": iceberg}[kind](tmp_path / "t")
    monkeypatch.setitem(sys.modules, {"delta": "deltalake", "iceberg": "pyiceberg.table"}[kind], None)
    with pytest.raises(InvalidInput, match=rf"pip install 'rowmill\[{kind}\]'"):
        find(tmp_path, "t")


@pytest.mark.parametrize(
    "protocol",
    [
        {
            "minReaderVersion": 3,
            "minWriterVersion": 7,
            "readerFeatures": ["deletionVectors"],
            "writerFeatures": ["deletionVectors"],
        },
        {"minReaderVersion": 2, "minWriterVersion": 5},
    ],
)
def test_what_the_library_cannot_read_is_refused(tmp_path: Path, protocol: dict[str, Any]) -> None:
    delta(tmp_path / "t")
    log = max((tmp_path / "t/_delta_log").glob("*.json"))
    lines = min((tmp_path / "t/_delta_log").glob("*.json")).read_text().splitlines()
    first = next(line for line in map(json.loads, lines) if "metaData" in line)
    more = [{"protocol": protocol}]
    if protocol["minReaderVersion"] == 2:
        first["metaData"]["configuration"] = {"delta.columnMapping.mode": "name"}
        more.append(first)
    following = log.with_name(f"{int(log.stem) + 1:020}.json")
    following.write_text("".join(json.dumps(line) + "\n" for line in more))
    with pytest.raises(InvalidInput, match=r"t is a table of Delta Lake.*(deletionVectors|columnMapping)"):
        find(tmp_path, "t")


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    delta(tmp_path / "t")
    for file in (tmp_path / "t/_delta_log").iterdir():
        file.write_text("{")
    with pytest.raises(InvalidInput, match="table of Delta Lake that cannot be read"):
        find(tmp_path, "t")


def test_remote_tables_are_refused_by_name(s3: S3, tmp_path: Path) -> None:
    store = ObjectStore(s3.storage_options)
    store.put_bytes(s3.url("t/_delta_log/00000000000000000000.json"), b"{}")
    store.put_bytes(s3.url("t/a.parquet"), put(tmp_path / "a.parquet").read_bytes())
    for pattern in ("t", "t/*.parquet"):
        with pytest.raises(InvalidInput, match="table of Delta Lake"):
            find(tmp_path, s3.url(pattern), store=store)
