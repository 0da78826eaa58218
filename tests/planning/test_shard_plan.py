"""Every row in exactly one shard, in order, within the limits, always the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.inputs import row_groups
from pipeline.inputs.row_groups import MAX_SLICES, InputFile
from pipeline.planning import shard_plan
from pipeline.planning.shard_plan import plan
from storage.records import ShardPlan, Slice

groups = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5000)), max_size=6)
inputs = st.lists(groups, max_size=8).map(lambda files: [InputFile(i, tuple(g)) for i, g in enumerate(files)])


def rows_of(shards: Sequence[ShardPlan]) -> list[tuple[int, int]]:
    return [(s.source, row) for shard in shards for s in shard.slices for row in range(s.row_lo, s.row_lo + s.row_n)]


@given(files=inputs, shard_rows=st.integers(1, 400), shard_bytes=st.integers(1, 8000))
@example(files=[InputFile(0, ((1, 2), (1, 0)))], shard_rows=2, shard_bytes=1)  # rows of no bytes after one of too many
def test_every_row_once_in_order_within_the_limits(files: list[InputFile], shard_rows: int, shard_bytes: int) -> None:
    shards = list(plan(files, shard_rows=shard_rows, shard_bytes=shard_bytes))
    assert rows_of(shards) == [(f.source, row) for f in files for row in range(sum(n for n, _ in f.row_groups))]
    assert sum(s.n_bytes for s in shards) == sum(b for f in files for n, b in f.row_groups if n)
    start = 0
    for idx, shard in enumerate(shards):
        assert (shard.idx, shard.row_start) == (idx, start)
        assert shard.row_n == sum(s.row_n for s in shard.slices) > 0
        assert shard.row_n <= shard_rows
        assert shard.n_bytes <= shard_bytes or shard.row_n == 1
        assert all(s.row_n > 0 for s in shard.slices)
        assert len({s.source for s in shard.slices}) == len(shard.slices), "adjacent rows of a file are one slice"
        start += shard.row_n
    assert shards == list(plan(iter(files), shard_rows=shard_rows, shard_bytes=shard_bytes))


@given(files=inputs, shard_rows=st.integers(1, 400))
def test_shards_are_filled(files: list[InputFile], shard_rows: int) -> None:
    shards = list(plan(files, shard_rows=shard_rows, shard_bytes=10**9))
    assert all(shard.row_n >= shard_rows * shard_plan.FULL_ENOUGH for shard in shards[:-1])


def test_small_files_share_a_shard_and_big_groups_are_cut() -> None:
    files = [InputFile(0, ((10, 100),)), InputFile(1, ((10, 100),)), InputFile(2, ((250, 2500),))]
    shards = list(plan(files, shard_rows=100, shard_bytes=10**6))
    assert [shard.slices for shard in shards] == [
        (Slice(0, 0, 10), Slice(1, 0, 10), Slice(2, 0, 80)),
        (Slice(2, 80, 100),),
        (Slice(2, 180, 70),),
    ]


def test_cuts_move_to_a_row_group_boundary_when_that_costs_little() -> None:
    file = InputFile(0, ((60, 600), (60, 600), (30, 300), (60, 600)))
    shards = list(plan([file], shard_rows=100, shard_bytes=10**6))
    assert [shard.row_n for shard in shards] == [60, 90, 60]


def test_a_row_bigger_than_the_limit_stands_alone() -> None:
    shards = list(plan([InputFile(0, ((3, 3000),))], shard_rows=100, shard_bytes=10))
    assert [(shard.row_n, shard.n_bytes) for shard in shards] == [(1, 1000)] * 3


@pytest.mark.parametrize("files", [[], [InputFile(0, ())], [InputFile(0, ((0, 0),)), InputFile(1, ())]])
def test_no_rows_no_shards(files: list[InputFile]) -> None:
    assert list(plan(files, shard_rows=10, shard_bytes=10)) == []


def test_tiny_files_do_not_pile_up_without_end() -> None:
    files = (InputFile(i, ((1, 10),)) for i in range(2500))
    shards = list(plan(files, shard_rows=50_000, shard_bytes=10**9))
    assert [len(shard.slices) for shard in shards] == [MAX_SLICES, MAX_SLICES, 500]


def test_planning_is_a_stream() -> None:
    drawn = 0

    def files() -> Iterator[InputFile]:
        nonlocal drawn
        for i in range(100_000):
            drawn += 1
            yield InputFile(i, ((100, 1000),))

    first = next(plan(files(), shard_rows=1000, shard_bytes=10**9))
    assert first.row_n == 1000
    assert drawn <= 12


def _numbered(files: Sequence[InputFile]) -> list[tuple[int, int]]:
    return [(s.source, row) for f in files for s in f.slices() for row in range(s.row_lo, s.row_lo + s.row_n)]


@given(files=inputs, ranges=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 40)), max_size=12))
def test_selected_rows_are_those_of_the_ranges(files: list[InputFile], ranges: list[tuple[int, int]]) -> None:
    rising, at = [], 0
    for gap, length in ranges:
        rising.append((at + gap % 200, at + gap % 200 + length + 1))
        at = rising[-1][1]
    everything = _numbered(files)
    chosen = list(row_groups.select(iter(files), rising))
    assert _numbered(chosen) == [everything[n] for lo, hi in rising for n in range(lo, min(hi, len(everything)))]
    assert rows_of(list(plan(chosen, shard_rows=50, shard_bytes=1000))) == _numbered(chosen)
    whole = list(row_groups.select(files, [(0, max(1, len(everything)))]))
    assert _numbered(whole) == everything
    assert sum(b for f in whole for _, b in f.row_groups) == sum(b for f in files for n, b in f.row_groups if n)


@given(total=st.integers(0, 10**7), rows=st.integers(1, 20_000))
@example(total=3000, rows=2999)
def test_a_sample_has_its_rows_spread_evenly_and_in_few_places(total: int, rows: int) -> None:
    ranges = list(row_groups.sample_ranges(total, rows))
    assert sum(hi - lo for lo, hi in ranges) == min(rows, total)
    assert len(ranges) <= row_groups.MAX_SLICES
    assert all(lo < hi <= total for lo, hi in ranges)
    assert all(before[1] <= after[0] for before, after in pairwise(ranges))
    if len(ranges) > 1:
        gaps = [after[0] - before[0] for before, after in pairwise(ranges)]
        assert max(gaps) - min(gaps) <= max(hi - lo for lo, hi in ranges)
    assert ranges == list(row_groups.sample_ranges(total, rows))
