"""Readers left open where one reader stopped, for the next one that reads on from there."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

MOST = 4
"""Readers kept at a time. Each holds its read-ahead buffers: about twice ``read_batch_bytes``."""


@dataclass(frozen=True, slots=True)
class _OpenReader:
    key: Hashable
    position: int
    reader: Any


class OpenReaderCache:
    """Safe to share between threads; a reader is handed to one taker only. Readers have a ``close``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: list[_OpenReader] = []  # the longest kept first

    def put(self, key: Hashable, position: int, reader: Any) -> None:
        """Keep a reader that goes on at ``position``; the one that was kept longest may have to go for it."""
        with self._lock:
            self._items.append(_OpenReader((os.getpid(), key), position, reader))
            gone = self._items[:-MOST]
            self._items = self._items[-MOST:]
        for item in gone:
            item.reader.close()

    def take(self, key: Hashable, position: int) -> Any:
        """The reader of this key that has the least to skip before ``position``, or ``None``."""
        mine = (os.getpid(), key)  # a forked child must not read on through its parent's files
        with self._lock:
            fitting = [item for item in self._items if item.key == mine and item.position <= position]
            if not fitting:
                return None
            best = max(fitting, key=lambda item: item.position)
            self._items.remove(best)
        return best.reader

    def close(self) -> None:
        """Close the readers."""
        with self._lock:
            items, self._items = self._items, []
        for item in items:
            item.reader.close()
