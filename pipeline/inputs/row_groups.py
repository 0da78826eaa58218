"""The row groups of a job's input, and which of their rows are wanted. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from storage.records import Slice

MAX_SLICES = 1000
"""Most slices in a shard: tiny files are read together, but one shard must not have to open tens of thousands."""


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
        for (rows, _), first in zip(self.row_groups, self.starts or begins(self.row_groups), strict=True):
            if not rows:
                continue
            if found and found[-1].row_lo + found[-1].row_n == first:
                found[-1] = Slice(self.source, found[-1].row_lo, found[-1].row_n + rows)
            else:
                found.append(Slice(self.source, first, rows))
        return tuple(found)


def begins(row_groups: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The row of the file at which each row group begins, when they follow one another from row 0 on."""
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
                pieces.append((hi - lo, bytes_of(rows, n_bytes, lo, hi)))
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


def bytes_of(rows: int, n_bytes: int, lo: int, hi: int) -> int:
    """Bytes of rows ``[lo, hi)`` of a group: floors of the running total, so that the parts add up to the whole."""
    return n_bytes * hi // rows - n_bytes * lo // rows
