"""Rows in partitions on disk: every row once, in its partition, in the order it came, whatever the memory."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.planning import spill as row_spill
from pipeline.planning.spill import PartitionedSpill
from storage.errors import StorageFull

SCHEMA = pa.schema([("text", pa.string()), ("kind", pa.dictionary(pa.int32(), pa.string()))])


PARTITIONS = 11


@pytest.fixture(autouse=True, params=[2, 3, 128])
def fan_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of groups, groups, and none."""
    monkeypatch.setattr(row_spill, "FAN_OUT", request.param)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it is the same for every example
@given(st.lists(st.lists(st.integers(0, PARTITIONS - 1), max_size=6), max_size=8), st.integers(0, 400))
def test_every_row_once_in_its_pile_and_in_order(batches: list[list[int]], n_bytes: int) -> None:
    first = 0
    expected: dict[int, list[tuple[int, str]]] = {partition: [] for partition in range(PARTITIONS)}
    with PartitionedSpill(SCHEMA, PARTITIONS, n_bytes) as spill:
        for partitions in batches:
            rows = np.arange(first, first + len(partitions))
            texts = [f"row {row}" for row in rows]
            columns = [
                pa.array(texts, pa.string()),
                pa.array([str(p) for p in partitions], pa.string()).dictionary_encode(),
            ]
            spill.put(rows, np.array(partitions, dtype=np.int64), pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
            for row, partition, text in zip(rows.tolist(), partitions, texts, strict=True):
                expected[partition].append((row, text))
            first += len(partitions)
        for partition in range(PARTITIONS):
            found = []
            for rows, table in spill.take(partition):
                assert table.schema == SCHEMA
                assert set(table["kind"].to_pylist()) == {str(partition)}
                found += list(zip(rows.tolist(), table["text"].to_pylist(), strict=True))
            assert found == expected[partition]


def test_a_full_disk_is_said_to_be_full() -> None:
    schema = pa.schema([("text", pa.string())])
    with PartitionedSpill(schema, 1, 1) as spill:
        spill._file = open("/dev/full", "wb", buffering=0)  # noqa: PTH123, SIM115 - a device, closed by the spill
        batch = pa.RecordBatch.from_pydict({"text": ["x" * 100_000]}, schema=schema)
        with pytest.raises(StorageFull, match="temporary file"):
            spill.put(np.array([0]), np.array([0]), batch)


def test_views_and_small_dictionaries_come_back_as_they_were() -> None:
    schema = pa.schema([("text", pa.string_view()), ("kind", pa.dictionary(pa.int8(), pa.string()))])
    with PartitionedSpill(schema, 2, 1) as spill:
        for first in (0, 100):
            names = pa.array([f"{first + n}" for n in range(100)])
            kinds = pa.DictionaryArray.from_arrays(pa.array(range(100), pa.int8()), names)
            batch = pa.RecordBatch.from_arrays([names.cast(pa.string_view()), kinds], schema=schema)
            spill.put(np.arange(first, first + 100), np.arange(100) // 50, batch)
        tables = [table for partition in range(2) for _, table in spill.take(partition)]
    assert all(table.schema == schema for table in tables)
    found = [value for table in tables for value in table["kind"].to_pylist()]
    assert sorted(found, key=int) == [f"{n}" for n in range(200)]
    assert found == [value for table in tables for value in table["text"].to_pylist()]


def test_stretches_are_few_however_many_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_spill, "FAN_OUT", 4)
    schema = pa.schema([("n", pa.int64())])
    with PartitionedSpill(schema, 64, 1) as spill:
        for _ in range(8):  # each one is a round
            batch = pa.RecordBatch.from_pydict({"n": list(range(64))}, schema=schema)
            spill.put(np.arange(64), np.arange(64), batch)
        assert sum(len(stretches) for stretches in spill._stretches) // 2 == 8 * 4
        for partition in range(64):
            assert [n for _, table in spill.take(partition) for n in table["n"].to_pylist()] == [partition] * 8
