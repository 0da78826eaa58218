"""No shard ends inside a sequence, and apart from that shards are as they were."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning.sequences import kept_whole
from storage.records import ShardPlan, Slice

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[ShardPlan], list[tuple[int, int]]]:
    """Shards of a file or two, and stretches of rows that do not overlap."""
    shards: list[ShardPlan] = []
    start = 0
    for idx, size in enumerate(draw(sizes)):
        shards.append(ShardPlan(idx, start, size, size * 10, (Slice(0, start, size),)))
        start += size
    ends = sorted(draw(st.sets(st.integers(0, start), max_size=8)))
    return shards, [(lo, hi - 1) for lo, hi in pairwise(ends) if draw(st.booleans())]


@given(cases())
def test_ends_are_moved_behind_the_sequences(case: tuple[list[ShardPlan], list[tuple[int, int]]]) -> None:
    shards, spans = case
    total = sum(shard.row_n for shard in shards)
    found = list(kept_whole(iter(shards), spans))
    assert [shard.idx for shard in found] == list(range(len(found)))
    assert [
        row for shard in found for item in shard.slices for row in range(item.row_lo, item.row_lo + item.row_n)
    ] == [*range(total)]
    assert all(shard.row_n == sum(item.row_n for item in shard.slices) > 0 for shard in found)
    assert all(before.row_start + before.row_n == after.row_start for before, after in pairwise(found))
    assert sum(shard.n_bytes for shard in found) == sum(shard.n_bytes for shard in shards)
    allowed = {row + 1 for row in range(total) if not any(first <= row < last for first, last in spans)}
    ends = {shard.row_start + shard.row_n for shard in found}
    assert ends <= allowed
    # Each end of before is there, or the first row behind its sequence at which one may end.
    assert ends == {min(row for row in allowed if row >= shard.row_start + shard.row_n) for shard in shards}
