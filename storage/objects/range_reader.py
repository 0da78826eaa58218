"""Reading parts of a remote object: in few requests, within a memory limit, and no byte that nobody asked for."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

BLOCK_BYTES = 8 * 2**20
"""Fetched at a time where no plan says more. Large enough that a request's latency is the smaller part of its time."""
HOLE_BYTES = 64 * 2**10
"""Bytes between two wanted ranges that are cheaper to fetch than a second request is to make."""
_SMALLEST_WINDOW = 256 * 2**10


class RangeReader(io.RawIOBase):
    """A seekable reader over ``fetch(lo, hi)``, which returns exactly the bytes ``[lo, hi)`` of the object.

    Without a plan it fetches ``BLOCK_BYTES`` from where it is read. ``etag`` is the version that every byte is of,
    where the store guarantees that; else ``None``.
    """

    def __init__(
        self, n_bytes: int, fetch: Callable[[int, int], bytes], close: Callable[[], None], etag: str | None = None
    ) -> None:
        super().__init__()
        self.n_bytes, self.etag = n_bytes, etag
        self._fetch, self._close = fetch, close
        self._at = 0
        self._limit = self._window = BLOCK_BYTES
        self._spans: list[tuple[int, int]] = []
        self._merged: set[int] = set()  # the spans, by number, that several ranges share
        self._windows: dict[int, memoryview] = {}  # begin → bytes, the least recently used first

    def plan(self, ranges: Iterable[tuple[int, int]], *, streams: int, limit: int) -> None:
        """Say which ranges ``[lo, hi)`` will be read, each front to back, up to ``streams`` of them side by side.

        Neighbours are then fetched together, large ones in windows, and about ``limit`` bytes are kept at most (but a
        small window for each stream).
        """
        share = max(2 * _SMALLEST_WINDOW, limit // max(1, streams))
        self._limit = share * max(1, streams)
        self._window = share // 2
        self._spans, self._merged = [], set()
        together = 0
        for lo, hi in sorted(ranges):
            if self._spans:
                first, last = self._spans[-1]
                # A span is kept whole while any of it is needed: it may take the shares of the streams in it.
                if lo - last <= HOLE_BYTES and hi - first <= share * min(together + 1, streams):
                    self._spans[-1] = (first, max(hi, last))
                    self._merged.add(len(self._spans) - 1)
                    together += 1
                    continue
            self._spans.append((lo, hi))
            together = 1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.n_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        hi = self.n_bytes if size is None or size < 0 else min(self.n_bytes, self._at + size)
        if hi <= self._at:
            return b""
        data = self._kept(self._at, hi)
        self._at = hi
        return bytes(data)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(view.nbytes)
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read()

    def close(self) -> None:
        if not self.closed:
            self._windows.clear()
            self._close()
        super().close()

    def _kept(self, lo: int, hi: int) -> memoryview | bytes:
        have = b""
        for begin, window in self._windows.items():
            if begin <= lo < begin + len(window):
                self._windows[begin] = self._windows.pop(begin)
                if hi <= begin + len(window):
                    return window[lo - begin : hi - begin]
                have = bytes(window[lo - begin :])
                del self._windows[begin]
                break
        begin = lo + len(have)
        end = max(hi, self._end(begin))
        data = memoryview(have + self._fetch(begin, end))
        self._windows[lo] = data
        kept = sum(map(len, self._windows.values()))
        for oldest in list(self._windows):
            if kept <= self._limit or oldest == lo:
                break
            kept -= len(self._windows.pop(oldest))
        return data[: hi - lo]

    def _end(self, begin: int) -> int:
        """Where to stop a request that begins here: a span that fits is fetched whole, else its next window."""
        at = bisect_right(self._spans, (begin, self.n_bytes)) - 1
        if at >= 0 and begin < self._spans[at][1]:
            lo, hi = self._spans[at]
            return hi if at in self._merged or hi - lo <= 2 * self._window else min(hi, begin + self._window)
        # Before a plan there is only the footer to read, or the whole file.
        return begin if self._spans else min(self.n_bytes, begin + BLOCK_BYTES)
