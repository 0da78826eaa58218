"""From row groups to shards. Pure: the same files give the same shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipeline.inputs.row_groups import MAX_SLICES, InputFile, begins, bytes_of
from storage.records import ShardPlan, Slice

FULL_ENOUGH = 0.5
"""A shard this full ends at a row-group boundary rather than take a part of a group that does not fit whole."""


class _Open:
    """The shard being filled. A group's bytes are taken to be spread evenly over its rows, in whole numbers."""

    def __init__(self, idx: int, row_start: int) -> None:
        self.idx, self.row_start = idx, row_start
        self.rows = self.bytes = 0
        self.slices: list[Slice] = []

    def add(self, source: int, row_lo: int, row_n: int, n_bytes: int) -> None:
        last = self.slices[-1] if self.slices else None
        if last is not None and last.source == source and last.row_lo + last.row_n == row_lo:
            self.slices[-1] = Slice(source, last.row_lo, last.row_n + row_n)
        else:
            self.slices.append(Slice(source, row_lo, row_n))
        self.rows += row_n
        self.bytes += n_bytes

    def closed(self) -> ShardPlan:
        return ShardPlan(self.idx, self.row_start, self.rows, self.bytes, tuple(self.slices))

    def successor(self) -> _Open:
        return _Open(self.idx + 1, self.row_start + self.rows)


def plan(files: Iterable[InputFile], *, shard_rows: int, shard_bytes: int) -> Iterator[ShardPlan]:
    """Shards over all rows of ``files``: contiguous, in order, each row in exactly one.

    A shard has at most ``shard_rows`` rows, about ``shard_bytes`` uncompressed bytes (but at least one row), and at
    most ``MAX_SLICES`` slices. Small files share a shard; a row group that is too big is cut. Cuts are moved to
    row-group boundaries where the shard is at least half full without the group. Reads ``files`` as a stream.
    """
    shard = _Open(0, 0)
    for file in files:
        starts = file.starts or begins(file.row_groups)
        for (group_rows, group_bytes), first in zip(file.row_groups, starts, strict=True):
            at = 0
            while at < group_rows:
                if len(shard.slices) >= MAX_SLICES and shard.slices[-1].source != file.source:
                    yield shard.closed()
                    shard = shard.successor()
                fits = min(
                    shard_rows - shard.rows,
                    _rows_within(shard_bytes - shard.bytes, group_rows, group_bytes, at),
                    group_rows - at,
                )
                fill = max(shard.rows / shard_rows, shard.bytes / shard_bytes)
                if shard.rows and (fits < 1 or (fits < group_rows - at and at == 0 and fill >= FULL_ENOUGH)):
                    yield shard.closed()
                    shard = shard.successor()
                    continue
                take = max(1, fits)
                shard.add(file.source, first + at, take, bytes_of(group_rows, group_bytes, at, at + take))
                at += take
    if shard.rows:
        yield shard.closed()


def _rows_within(room: int, rows: int, n_bytes: int, lo: int) -> int:
    """The most rows from ``lo`` on whose :func:`bytes_of` stays within ``room``."""
    if n_bytes <= 0:
        return rows - lo if room >= 0 else 0
    return max(0, ((room + n_bytes * lo // rows + 1) * rows - 1) // n_bytes - lo)
