"""Rows of one sequence stay in one shard (the field ``sequence``): a graph's state goes from one to the next."""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterable, Iterator, Sequence

from pyroaring import BitMap

from pipeline.engines.sequence_keys import keys_of
from pipeline.inputs.input_rows import InputRows
from storage.records import ShardPlan, Slice


class SequenceRows:
    """The rows of each sequence, by their indices in ``rows``. Reads one column."""

    def __init__(self, rows: InputRows, column: str) -> None:
        self._rows: dict[Hashable, BitMap] = {}
        for ids, batch in rows.read((column,)):
            found: dict[Hashable, list[int]] = {}
            for row, key in zip(ids.tolist(), keys_of(batch.column(0)), strict=True):
                if key is not None:
                    found.setdefault(key, []).append(row)
            for key, more in found.items():
                self._rows.setdefault(key, BitMap()).update(more)

    def with_earlier(self, rows: BitMap) -> BitMap:
        """``rows``, and all rows of their sequences that come before them."""
        needed = BitMap(rows)
        for members in self._rows.values():
            if asked := members & rows:
                needed |= members[: members.rank(asked.max())]
        return needed

    def spans(self) -> list[tuple[int, int]]:
        """First and last row of each stretch that no shard may end inside of, in order; they do not overlap."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted((members.min(), members.max()) for members in self._rows.values()):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        return merged


def kept_whole(shards: Iterable[ShardPlan], spans: Sequence[tuple[int, int]]) -> Iterator[ShardPlan]:
    """Pure: the shards, with every end that falls inside a span moved to the end of that span.

    Such shards may be larger than the job's limits. A shard that is used up by the one before it is left out.
    """
    firsts = [first for first, _ in spans]
    idx, start = 0, 0
    slices: list[Slice] = []
    rows, n_bytes = 0, 0
    for shard in shards:
        left, left_bytes = list(shard.slices), shard.n_bytes
        at, n_rows = shard.row_start, shard.row_n
        while n_rows:
            # The shard that is open ends here, unless a span goes on beyond this row.
            place = bisect.bisect_left(firsts, at) - 1
            inside = place >= 0 and spans[place][1] >= at
            if slices and not inside and at == shard.row_start:
                yield ShardPlan(idx, start, rows, n_bytes, tuple(slices))
                idx, start, slices, rows, n_bytes = idx + 1, start + rows, [], 0, 0
            take = min(n_rows, spans[place][1] + 1 - at) if slices and inside else n_rows
            taken, left = _split(left, take)
            share = left_bytes * take // n_rows
            slices = _joined(slices, taken)
            rows, n_bytes = rows + take, n_bytes + share
            at, n_rows, left_bytes = at + take, n_rows - take, left_bytes - share
            if n_rows:  # the span ended within this shard, whose rest is a shard of its own
                yield ShardPlan(idx, start, rows, n_bytes, tuple(slices))
                idx, start, slices, rows, n_bytes = idx + 1, start + rows, [], 0, 0
    if slices:
        yield ShardPlan(idx, start, rows, n_bytes, tuple(slices))


def _split(slices: list[Slice], rows: int) -> tuple[list[Slice], list[Slice]]:
    taken: list[Slice] = []
    for at, item in enumerate(slices):
        if not rows:
            return taken, slices[at:]
        if item.row_n > rows:
            rest = Slice(item.source, item.row_lo + rows, item.row_n - rows)
            return [*taken, Slice(item.source, item.row_lo, rows)], [rest, *slices[at + 1 :]]
        taken.append(item)
        rows -= item.row_n
    return taken, []


def _joined(before: list[Slice], after: list[Slice]) -> list[Slice]:
    if before and after and before[-1].source == after[0].source:
        last, first = before[-1], after[0]
        if last.row_lo + last.row_n == first.row_lo:
            return [*before[:-1], Slice(last.source, last.row_lo, last.row_n + first.row_n), *after[1:]]
    return [*before, *after]
