"""File metadata is carried where it stays true."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.inputs.schema import agreed, carried

GEO = json.dumps({"version": "1.1.0", "primary_column": "where", "columns": {"where": {"encoding": "WKB"}}}).encode()


def test_only_what_all_files_say_is_agreed() -> None:
    assert agreed([]) == {}
    assert agreed([{b"a": b"1", b"b": b"2"}]) == {b"a": b"1", b"b": b"2"}
    assert agreed([{b"a": b"1", b"b": b"2"}, {b"b": b"3", b"a": b"1"}]) == {b"a": b"1"}
    assert agreed([{b"a": b"1"}, None]) == {}


def test_what_describes_the_whole_table_stays_behind() -> None:
    table = {b"pandas": b"{}", b"huggingface": b"{}", b"org.apache.spark.sql.parquet.row.metadata": b"{}"}
    assert carried({**table, b"licence": b"CC0"}, ["a"]) == {b"licence": b"CC0"}


def test_geometry_needs_its_columns() -> None:
    assert carried({b"geo": GEO}, ["where", "a"]) == {b"geo": GEO}
    assert carried({b"geo": GEO}, ["a"]) == {}


def test_a_geoparquet_file_stays_one(tmp_path: Path, settings: Settings) -> None:
    for name in ("a", "b"):
        table = pa.table({"where": [b"\x01"], "text": [name]})
        found = {b"geo": GEO, b"licence": b"CC0", b"name": name.encode(), b"pandas": b"{}"}
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(table.replace_schema_metadata(found), tmp_path / "in" / f"{name}.parquet")
    with Client(settings=settings) as client:
        fields = {"model": "fake", "task": "generate", "prompt": "{text}", "input": str(tmp_path / "in")}
        client.run(**fields, output=str(tmp_path / "out"))
        client.run(**fields, output=str(tmp_path / "narrow"), keep_columns=["text"])
    [part] = (tmp_path / "out" / "data").iterdir()
    assert pq.read_schema(part).metadata == {b"geo": GEO, b"licence": b"CC0"}
    [part] = (tmp_path / "narrow" / "data").iterdir()
    assert pq.read_schema(part).metadata == {b"licence": b"CC0"}
