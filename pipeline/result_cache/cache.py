"""A cache of results in the object store: shards look results up and add to them; a failing store never fails a shard.

::

    <root>/tenant=<tenant>/<namespace>/<uuid7>-<rows>.parquet        see storage/parquet/keyed_segments.py

A process keeps the hashes of a namespace in memory, and what it has read of it already it never reads again; a shard
lists its folder once. Whatever goes wrong with the store or with a segment costs answers, which are computed then.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.result_cache.index import ENTRY_BYTES, Index, SegmentOffsets, split
from pipeline.result_cache.keys import namespace
from storage import failpoints
from storage.errors import CorruptFile, InvalidInput
from storage.log_actions import Action
from storage.logs import get_logger, pool_with_ids
from storage.objects.store import ObjectStore
from storage.parquet import keyed_segments
from storage.parquet.keyed_segments import Segment

log = get_logger(__name__)

SEGMENT_ROWS, SEGMENT_BYTES = 65_536, 16 * 2**20
"""Answers that are gathered before they are written, at most: a segment, and the memory that a shard needs for it."""
REST_SECONDS = 300.0
"""After the store has failed it is left alone for so long: each try may wait for a minute, and every shard would."""
_READERS = 8
_ABANDONED_SECONDS = 86_400.0
_MOST_KNOWN = 64
"""Namespaces that a process remembers, however small they are."""


@dataclass
class _Known:
    """What this process knows of one folder. Under ``lock``."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    index: Index = field(default_factory=Index)
    numbers: dict[str, int] = field(default_factory=dict)
    segments: dict[int, Segment] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    next: int = 0


class ResultCaches:
    """The answers below ``root``, a folder or a URL; ``index_bytes`` bounds the memory of their hashes. One for each
    process, safe to share between threads. ``notify`` tells the user that answers cannot be kept, once. After the store
    has failed nothing is found or kept for ``REST_SECONDS``, by the clock ``now``."""

    def __init__(
        self,
        store: ObjectStore,
        root: str,
        index_bytes: int,
        notify: Any = lambda message: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._root, self._most = store, root.rstrip("/"), index_bytes // ENTRY_BYTES
        self._notify, self._told = notify, False
        self._now, self._rests_until = now, float("-inf")
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def open(self, tenant: str, facts: Mapping[str, Any], schema: pa.Schema) -> ResultCache:
        """The answers of one tenant under ``facts``, with the columns of ``schema``: those that are there now."""
        folder = f"{self._root}/tenant={tenant}/{namespace({'tenant': tenant, 'schema': _text(schema), **facts})}"
        with self._lock:
            known = self._known.setdefault(folder, _Known())
            self._known.move_to_end(folder)
        cache = ResultCache(self._store, folder, schema, self._failed, known.damaged.add)
        if self._resting():
            cache.rest()
            return cache
        with known.lock:
            if self._resting():  # since another call has waited for the store in vain
                cache.rest()
                return cache
            try:
                self._refresh(known, folder)
            except Exception as error:  # whatever it is, it is no reason to fail a job
                cache.fail(f"looked up below {folder}", error)
            else:
                cache.index, cache.segments = known.index, dict(known.segments)
        with self._lock:
            while len(self._known) > 1 and (
                len(self._known) > _MOST_KNOWN or sum(len(each.index) for each in self._known.values()) > self._most
            ):
                self._known.popitem(last=False)
        return cache

    def _refresh(self, known: _Known, folder: str) -> None:
        wanted: dict[str, Segment] = {}
        room = self._most
        for segment in keyed_segments.listed(self._store, folder):  # the newest first
            if segment.n_rows > room:
                break
            if segment.uri not in known.damaged:
                room -= segment.n_rows
                wanted[segment.uri] = segment
        gone = [number for uri, number in known.numbers.items() if uri not in wanted]
        fresh = [segment for uri, segment in wanted.items() if uri not in known.numbers]
        if not gone and not fresh:
            return
        with pool_with_ids(_READERS, "rowmill-cache") as pool:
            found = list(pool.map(lambda segment: self._hashes(known, folder, segment), fresh))
        added = []
        for segment, hashes in zip(fresh, found, strict=True):
            if hashes is not None:
                added.append((known.next, hashes))
                known.numbers[segment.uri], known.segments[known.next] = known.next, segment
                known.next += 1
        known.index = known.index.with_segments(added, gone)
        for number in gone:
            del known.numbers[known.segments.pop(number).uri]

    def _hashes(self, known: _Known, folder: str, segment: Segment) -> Any:
        try:
            return keyed_segments.hashes_of(self._store, folder, segment)
        except CorruptFile as error:
            known.damaged.add(segment.uri)
            log.warning("a file of cached results is left aside: %s", error, action=Action.CACHE_SEGMENT_SKIPPED)
        except InvalidInput:
            log.info("%s has just been deleted", segment.uri, action=Action.CACHE_SEGMENT_GONE)
        return None

    def _resting(self) -> bool:
        return self._now() < self._rests_until

    def _failed(self, what: str, error: BaseException) -> None:
        self._rests_until = self._now() + REST_SECONDS
        log.warning("cached results cannot be %s: %s", what, error, action=Action.CACHE_UNAVAILABLE)
        if not self._told:
            self._told = True
            self._notify(f"cached results cannot be {what}, so rows are computed again ({error})")


class ResultCache:
    """What one call of an engine uses. ``find``, ``read`` are for one thread, ``add`` and ``finish`` for another.

    ``written``: answers that were added to the store; ``failures``: times that the store failed. A failure to read ends
    all use of it, a failure to write ends writing.
    """

    def __init__(
        self,
        store: ObjectStore,
        folder: str,
        schema: pa.Schema,
        failed: Callable[[str, BaseException], None],
        damaged: Callable[[str], None],
    ) -> None:
        self._store, self.folder, self._schema = store, folder, schema
        self._failed, self._damaged = failed, damaged
        self.index = Index()
        self.segments: dict[int, Segment] = {}
        self.written = self.failures = 0
        self._keys: list[bytes] = []
        self._values: list[pa.RecordBatch] = []
        self._bytes = 0
        self._writes = True
        self._pool = pool_with_ids(1, "rowmill-cache")
        self._pending: Future[Segment] | None = None

    def fail(self, what: str, error: BaseException) -> None:
        """The store failed to read: count it, say it, and stop using the store."""
        self.failures += 1
        self.rest()
        self._failed(what, error)

    def rest(self) -> None:
        """Find nothing and keep nothing from now on."""
        self.index, self._writes = Index(), False

    def find(self, keys: Sequence[bytes]) -> SegmentOffsets:
        """int64 [n]: where the answers may be, or -1. Nothing is read."""
        return self.index.find(keyed_segments.hashes(keys))

    def read(self, keys: Sequence[bytes], offsets: SegmentOffsets) -> Iterator[tuple[list[int], pa.RecordBatch]]:
        """The answers at offsets that :meth:`find` gave for keys: (which, by position; as many rows of values).

        Each row group is read once. What turns out to be another's answer, to be gone or to be damaged does not come.
        """
        numbers, rows = split(np.asarray(offsets, np.int64))
        for number in np.unique(numbers):
            at = np.flatnonzero(numbers == number)
            at = at[np.argsort(rows[at], kind="stable")]
            try:
                for which, found, table in keyed_segments.read(
                    self._store, self.folder, self.segments[int(number)], rows[at], self._schema
                ):
                    right = [i for i, key in enumerate(found) if keys[at[which[i]]] == key]
                    if right:
                        values = table if len(right) == len(found) else table.take(right)
                        (batch,) = values.combine_chunks().to_batches()
                        yield [int(at[which[i]]) for i in right], batch
            except (CorruptFile, InvalidInput) as error:
                # It must not stand before the answers that are computed and kept in its place now.
                self._damaged(self.segments[int(number)].uri)
                log.warning("cached results are left aside: %s", error, action=Action.CACHE_SEGMENT_SKIPPED)
            except Exception as error:
                self.fail(f"read below {self.folder}", error)
                return

    def add(self, keys: Sequence[bytes], values: pa.RecordBatch) -> None:
        """Keep the answers to n keys, n rows of values, once enough have come together; another thread writes them."""
        if not self._writes or not len(keys):
            return
        self._keys += keys
        self._values.append(values)
        self._bytes += values.nbytes + keyed_segments.KEY_BYTES * len(keys)
        if len(self._keys) >= SEGMENT_ROWS or self._bytes >= SEGMENT_BYTES:
            self._begin()

    def finish(self) -> None:
        """Write what is left, and wait until it is written. Safe to call twice."""
        if self._keys:
            self._begin()
        self._settle()
        self._writes = False
        self._pool.shutdown()

    def _begin(self) -> None:
        self._settle()
        keys, values = self._keys, pa.Table.from_batches(self._values)
        self._keys, self._values, self._bytes = [], [], 0
        if self._writes:
            self._pending = self._pool.submit(keyed_segments.write, self._store, self.folder, keys, values)

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            made = pending.result()
        except Exception as error:
            self._writes = False
            self.failures += 1
            self._failed(f"written below {self.folder}", error)
            return
        self.written += made.n_rows
        failpoints.hit("cache.stored")


def collect(store: ObjectStore, root: str, *, older_than: float, most_bytes: int | None) -> tuple[int, int]:
    """Delete the segments made before ``older_than`` (Unix seconds), and the oldest beyond ``most_bytes`` in all.

    Returns how many were deleted, and their bytes. Jobs that read them meanwhile compute those rows.
    """
    gone: list[Segment] = []
    left = 0
    for segment in keyed_segments.listed(store, root):  # the newest first
        left += segment.n_bytes
        if segment.made_at < older_than or (most_bytes is not None and left > most_bytes):
            gone.append(segment)
    store.delete([segment.uri for segment in gone])
    keyed_segments.delete_abandoned(root, time.time() - _ABANDONED_SECONDS)
    return len(gone), sum(segment.n_bytes for segment in gone)


def _text(schema: pa.Schema) -> list[list[str]]:
    return [[each.name, str(each.type)] for each in schema]
