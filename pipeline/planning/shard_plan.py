"""From row groups to shards, perhaps over some of the rows. Pure: the same files give the same shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from storage.records import ShardPlan, Slice

MAX_SLICES = 1000
"""Most slices in a shard: tiny files are read together, but not so many that one shard must open tens of thousands."""
FULL_ENOUGH = 0.5
"""A shard this full ends at a row-group boundary rather than take a part of a group that does not fit whole."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """``row_groups``: (rows, uncompressed bytes) of each row group of source number ``source``, in file order.

    ``starts``: the row of the file at which each of them begins, where only pieces of row groups are to be read; empty
    when they follow one another from row 0 on.
    """

    source: int
    row_groups: tuple[tuple[int, int], ...]
    starts: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows in all of its row groups."""
        return sum(rows for rows, _ in self.row_groups)

    def slices(self) -> tuple[Slice, ...]:
        """All of its rows, as runs that do not touch."""
        found: list[Slice] = []
        for (rows, _), first in zip(self.row_groups, self.starts or _begins(self.row_groups), strict=True):
            if not rows:
                continue
            if found and found[-1].row_lo + found[-1].row_n == first:
                found[-1] = Slice(self.source, found[-1].row_lo, found[-1].row_n + rows)
            else:
                found.append(Slice(self.source, first, rows))
        return tuple(found)


def _begins(row_groups: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(accumulate((rows for rows, _ in row_groups), initial=0))[:-1]


def sample_ranges(total: int, rows: int) -> Iterator[tuple[int, int]]:
    """``rows`` of ``total`` rows, spread evenly: half-open ranges in rising order, at most ``MAX_SLICES`` of them.

    Up to ``MAX_SLICES`` rows stand alone; of more, some follow one another, so that a shard does not have to be read
    from tens of thousands of places. The same numbers give the same rows.
    """
    rows = min(rows, total)
    length = max(1, -(-rows // MAX_SLICES))
    blocks, wanted = -(-total // length), -(-rows // length)
    left = rows
    for n in range(wanted):
        lo = n * blocks // wanted * length
        size = min(length, left, total - lo)
        left -= size
        yield lo, lo + size


def select(files: Iterable[InputFile], ranges: Iterable[tuple[int, int]]) -> Iterator[InputFile]:
    """The pieces of the files' row groups that lie in ``ranges``: half-open, rising, by rows counted over all files.

    Files without any such row are left out.
    """
    rest = iter(ranges)
    wanted = next(rest, None)
    first = 0
    for file in files:
        pieces: list[tuple[int, int]] = []
        starts: list[int] = []
        in_file = 0
        for rows, n_bytes in file.row_groups:
            while rows and wanted is not None and wanted[0] < first + rows:
                lo, hi = max(wanted[0] - first, 0), min(wanted[1] - first, rows)
                pieces.append((hi - lo, _bytes_of(rows, n_bytes, lo, hi)))
                starts.append(in_file + lo)
                if wanted[1] > first + rows:
                    break
                wanted = next(rest, None)
            first += rows
            in_file += rows
        if pieces:
            yield InputFile(file.source, tuple(pieces), tuple(starts))
        if wanted is None:
            return


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
        starts = file.starts or _begins(file.row_groups)
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
                shard.add(file.source, first + at, take, _bytes_of(group_rows, group_bytes, at, at + take))
                at += take
    if shard.rows:
        yield shard.closed()


def _bytes_of(rows: int, n_bytes: int, lo: int, hi: int) -> int:
    """Bytes of rows ``[lo, hi)`` of a group: floors of the running total, so that the parts add up to the whole."""
    return n_bytes * hi // rows - n_bytes * lo // rows


def _rows_within(room: int, rows: int, n_bytes: int, lo: int) -> int:
    """The most rows from ``lo`` on whose :func:`_bytes_of` stays within ``room``."""
    if n_bytes <= 0:
        return rows - lo if room >= 0 else 0
    return max(0, ((room + n_bytes * lo // rows + 1) * rows - 1) // n_bytes - lo)
