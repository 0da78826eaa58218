"""Pure: which rows of a job belong together, by what their prompts begin with.

The range partitioning of an external sort (as TeraSort does it), without the sort: a uniform sample of the keys is
sorted and cut where neighbours share least; each row goes to the partition whose range its key falls in. What begins
alike lies in one range, so it stays together, unless one beginning has more rows than a partition may have.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from pipeline.prefix.order import shared

SAMPLE_KEYS = 65_536
"""Most keys in a sample."""
FILL = 0.75
"""Rows that a partition is meant to have, of those it may: cuts move by a quarter, and a sample is no census."""
SLACK = 0.25
"""How far, of a partition's size, a cut may move to a place where less is shared."""


class Sample:
    """A uniform sample of a stream of keys, within ``most`` keys and ``n_bytes`` bytes. Same stream, same sample.

    A key is kept when a number drawn for it is below the rate; when the sample grows too large, the rate is halved and
    what is above it goes (Bernoulli sampling by halves).
    """

    def __init__(self, n_bytes: int, most: int = SAMPLE_KEYS) -> None:
        self._limit, self._most = n_bytes, most
        self._draws = np.random.default_rng(0)
        self._rate = 1.0
        self._kept: list[tuple[float, bytes]] = []
        self._bytes = 0

    def add(self, keys: Sequence[bytes]) -> None:
        """The next keys of the stream."""
        drawn = self._draws.random(len(keys))
        for at in np.flatnonzero(drawn < self._rate).tolist():
            if drawn[at] < self._rate:
                self._kept.append((float(drawn[at]), keys[at]))
                self._bytes += len(keys[at])
            while len(self._kept) > self._most or (self._bytes > self._limit and len(self._kept) > 1):
                self._rate /= 2
                self._kept = [item for item in self._kept if item[0] < self._rate]
                self._bytes = sum(len(key) for _, key in self._kept)

    def sorted(self) -> list[bytes]:
        return sorted(key for _, key in self._kept)


def separators(sample: Sequence[bytes], share: float) -> list[bytes]:
    """Where to cut: rising keys, the ``i``-th being the least of partition ``i + 1``.

    ``sample`` is sorted; ``share`` is how much of all rows a partition is meant to have, in (0, 1].
    """
    size = max(1.0, share * len(sample))
    cuts: list[bytes] = []
    at = 0
    while len(sample) - at > size * (1 + SLACK):
        low = at + max(1, round(size * (1 - SLACK)))
        high = min(len(sample) - 1, at + max(1, round(size * (1 + SLACK))))
        cut = _least_shared(sample, low, high, at + size)
        if cut is None:
            # One key is all there is here: the partition ends with it.
            cut = bisect_right(sample, sample[high])
            if cut >= len(sample):
                break
        cuts.append(_least_between(sample[cut - 1], sample[cut]))
        at = cut
    return cuts


def _least_shared(sample: Sequence[bytes], low: int, high: int, middle: float) -> int | None:
    """The place in ``[low, high]`` whose key shares least with the one before, nearest to ``middle``; they differ."""
    found: tuple[int, float, int] | None = None
    for at in range(low, high + 1):
        left, right = sample[at - 1], sample[at]
        if left != right:
            rank = (shared(left, right, 1), abs(at - middle), at)
            found = rank if found is None else min(found, rank)
    return None if found is None else found[2]


def _least_between(left: bytes, right: bytes) -> bytes:
    """The shortest beginning of ``right`` that sorts after ``left``."""
    return right[: shared(left, right, 1) + 1]


def partition_of(keys: Sequence[bytes], cuts: Sequence[bytes]) -> list[int]:
    """The partition of each key."""
    return [bisect_right(cuts, key) for key in keys]
