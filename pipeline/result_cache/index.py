"""Where answers are kept, by the first eight bytes of their keys: sixteen bytes an answer, looked up together. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt

ENTRY_BYTES = 16
_ROW_BITS = np.uint64(32)

Hashes = npt.NDArray[np.uint64]
SegmentOffsets = npt.NDArray[np.int64]


class Index:
    """Immutable. A *segment offset* is a segment's number and a row in it, in one number; ``-1`` is none.

    Of two answers with equal hashes it finds one: the reader compares the whole key, and makes do without an answer
    where it is another's.
    """

    def __init__(self, hashes: Hashes | None = None, offsets: npt.NDArray[np.uint64] | None = None) -> None:
        self._hashes = np.empty(0, np.uint64) if hashes is None else hashes
        self._offsets = np.empty(0, np.uint64) if offsets is None else offsets

    def __len__(self) -> int:
        return len(self._hashes)

    def with_segments(self, added: Iterable[tuple[int, Hashes]], gone: Collection[int] = ()) -> Index:
        """This index with the rows of some segments (number below 2³¹ → uint64 [n], by row) and without others'."""
        hashes, offsets = [self._hashes], [self._offsets]
        if len(gone):
            stays = ~np.isin(self._offsets >> _ROW_BITS, np.fromiter(gone, np.uint64))
            hashes, offsets = [self._hashes[stays]], [self._offsets[stays]]
        for number, found in added:
            hashes.append(found)
            offsets.append((np.uint64(number) << _ROW_BITS) + np.arange(len(found), dtype=np.uint64))
        every = np.concatenate(hashes)
        order = np.argsort(every, kind="stable")
        return Index(every[order], np.concatenate(offsets)[order])

    def find(self, wanted: Hashes) -> SegmentOffsets:
        """int64 [n]: the offset of each, or -1."""
        if not len(self._hashes):
            return np.full(len(wanted), -1, np.int64)
        at = np.searchsorted(self._hashes, wanted)
        inside = np.minimum(at, len(self._hashes) - 1)
        return np.where(self._hashes[inside] == wanted, self._offsets[inside].astype(np.int64), -1)


def split(offsets: SegmentOffsets) -> tuple[SegmentOffsets, SegmentOffsets]:
    """int64 [n] each: segment numbers and rows."""
    return offsets >> 32, offsets & 0xFFFFFFFF
