"""Reading ranges: the right bytes, in few requests, within the limit; then counted at a real S3 endpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.objects import range_reader
from storage.objects.range_reader import RangeReader
from storage.objects.store import ObjectStore
from storage.parquet import parquet
from storage.records import Slice, Source
from tests.conftest import S3
from tests.storage.objects.faulty_s3 import Faults, proxy

DATA = bytes(np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8))


class Counted:
    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.reader = RangeReader(len(DATA), self.fetch, lambda: None)

    def fetch(self, lo: int, hi: int) -> bytes:
        assert 0 <= lo < hi <= len(DATA)
        self.calls.append((lo, hi))
        return DATA[lo:hi]

    @property
    def n_bytes(self) -> int:
        return sum(hi - lo for lo, hi in self.calls)


spot = st.integers(0, len(DATA))


@settings(deadline=None)
@given(
    plans=st.lists(st.lists(st.tuples(spot, spot).map(sorted).map(tuple), max_size=5), max_size=2),
    reads=st.lists(st.tuples(spot, st.integers(-1, 400_000)), max_size=30),
    limit=st.integers(1, 4_000_000),
)
def test_any_read_after_any_plan_returns_the_bytes(
    plans: list[list[tuple[int, int]]], reads: list[tuple[int, int]], limit: int
) -> None:
    counted = Counted()
    for plan in [[], *plans]:
        if plan:
            counted.reader.plan(plan, streams=len(plan), limit=limit)
        for at, size in reads:
            counted.reader.seek(at)
            expected = DATA[at:] if size < 0 else DATA[at : at + size]
            assert counted.reader.read(size) == expected
            assert counted.reader.tell() == at + len(expected)


@settings(deadline=None)
@given(st.lists(st.integers(1, 900_000), min_size=1, max_size=6), st.integers(1, 8), st.integers(50_000, 4_000_000))
def test_planned_ranges_are_fetched_once_and_nothing_else(sizes: list[int], group: int, limit: int) -> None:
    edges = np.minimum(np.cumsum([1000, *sizes]), len(DATA)).tolist()
    plan = [(lo, hi) for lo, hi in pairwise(edges) if lo < hi]
    counted = Counted()
    counted.reader.plan(plan, streams=len(plan), limit=limit)
    at = dict(plan)
    left = {lo: lo for lo in at}
    while left:  # side by side, as the columns of a row group are
        for lo, now in list(left.items()):
            step = min(group * 20_000, at[lo] - now)
            counted.reader.seek(now)
            assert counted.reader.read(step) == DATA[now : now + step]
            left[lo] = now + step
            if left[lo] == at[lo]:
                del left[lo]
    assert counted.n_bytes == sum(hi - lo for lo, hi in plan)


def test_neighbours_come_together_and_large_ranges_in_windows() -> None:
    counted = Counted()
    counted.reader.plan([(0, 1000), (2000, 5000), (10_000, 20_000)], streams=3, limit=4_000_000)
    for lo, hi in ((0, 1000), (10_000, 20_000), (2000, 5000)):
        counted.reader.seek(lo)
        counted.reader.read(hi - lo)
    assert counted.calls == [(0, 20_000)]
    counted = Counted()
    counted.reader.plan([(0, 1000), (1000 + range_reader.HOLE_BYTES + 1, 2_900_000)], streams=2, limit=2_000_000)
    counted.reader.read(1000)
    counted.reader.seek(1000 + range_reader.HOLE_BYTES + 1)
    while counted.reader.read(50_000) and counted.reader.tell() < 2_800_000:
        pass
    assert counted.calls[0] == (0, 1000)
    assert {hi - lo for lo, hi in counted.calls[1:-1]} == {500_000}


# -- counted at an S3 endpoint


@pytest.fixture
def faults(s3: S3) -> Iterator[Faults]:
    with proxy(s3.endpoint) as running:
        yield running


def test_only_the_wanted_columns_of_the_wanted_row_groups_are_fetched(s3: S3, faults: Faults) -> None:
    """The floor: a look at the object, its footer, and one request for neighbours that are wanted."""
    store = ObjectStore(replace(s3, endpoint=faults.endpoint).storage_options)
    random = np.random.default_rng(0)
    table = pa.table({name: random.random(40_000) for name in ("a", "b", "fat", "c")})
    table = table.set_column(2, "fat", [pa.array([os.urandom(200) for _ in range(40_000)])])
    with store.create(s3.url("f.parquet")) as new:
        pq.write_table(table, new, row_group_size=10_000, use_dictionary=False)
    info = store.info(s3.url("f.parquet"))
    footer = parquet.stats(store, info.uri)
    with store.open(info.uri) as file:
        metadata = pq.ParquetFile(file).metadata
    wanted = [metadata.row_group(group).column(column) for group in (1, 2) for column in (0, 1, 3)]
    floor = sum(chunk.total_compressed_size for chunk in wanted)

    def read(slices: list[Slice], columns: list[str]) -> pa.Table:
        faults.requests.clear()
        source = Source(0, info.uri, info.etag, info.n_bytes, footer.n_rows)
        batches = parquet.read(
            store, {0: source}, slices, schema=footer.schema, columns=columns, only=None, batch_rows=1024,
            batch_bytes=2**24,
        )  # fmt: skip
        return pa.Table.from_batches([batch for _, batch in batches])

    found = read([Slice(0, 10_000, 20_000)], ["a", "b", "c"])
    assert found.equals(table.select(["a", "b", "c"]).slice(10_000, 20_000).combine_chunks())
    gets = [request for request in faults.requests if request.method == "GET"]
    heads = [request for request in faults.requests if request.method == "HEAD"]
    tail = 64 * 2**10
    # a+b of group 1; c of group 1 with a+b of group 2, which it stands beside; c of group 2
    assert gets[0].n_bytes == tail
    assert len(gets) == 4 and sum(request.n_bytes for request in gets) == tail + floor
    assert len(heads) == 2, "one look at the version, one to open it"

    faults.requests.clear()
    read([Slice(0, 0, 15_000)], ["fat"])
    first = sum(request.n_bytes for request in faults.requests)
    rest = read([Slice(0, 15_000, 25_000)], ["fat"])
    assert rest.equals(table.select(["fat"]).slice(15_000).combine_chunks())
    fat = sum(metadata.row_group(group).column(2).total_compressed_size for group in range(4))
    again = sum(request.n_bytes for request in faults.requests)
    assert first + again == tail + fat, "the second reader goes on where the first one stopped"
    assert [request.method for request in faults.requests].count("HEAD") == 1
