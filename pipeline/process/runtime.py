"""Everything a process needs to work on jobs: database, object store, engines, and its own identity."""

from __future__ import annotations

import errno
import os
import platform
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import psutil
import pyarrow as pa
import uuid_utils

from pipeline.config.settings import Settings
from pipeline.engines import registry
from pipeline.engines.base import EngineContext
from pipeline.engines.pool import EnginePool
from pipeline.inputs.input_rows import InputRows
from pipeline.process.exclusive import PreemptibleLock
from pipeline.process.permissions import RowFiles, granted
from pipeline.registry.resolver import Resolver
from pipeline.result_cache.cache import ResultCaches
from storage.errors import CommitUnknown, InvalidSettings, TransientError
from storage.fleet import workers
from storage.fleet.workers import Worker
from storage.objects.store import ObjectStore
from storage.records import Slice, Source
from storage.sql.database import Database

CACHE_PATIENCE_SECONDS = 10.0
"""How long one operation on cached results is tried again before they are done without."""


class _Inside:
    """How many threads are inside a block of ``Runtime.registered``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0


@dataclass(frozen=True, slots=True)
class Runtime:
    """Made by :func:`start`, ended by :meth:`close`. ``notify`` tells the user something worth a line.

    ``unflushed`` counts, by shard id, the rows that this process has finished and not yet flushed: for progress only.
    The shards in flight share ``engine_lock``; one that searches for a poison row holds it exclusively.
    """

    settings: Settings
    database: Database
    store: ObjectStore
    engines: EnginePool
    worker: Worker
    notify: Callable[[str], None] = field(default=lambda message: None)
    unflushed: dict[str, int] = field(default_factory=dict)
    engine_lock: PreemptibleLock = field(default_factory=PreemptibleLock)
    _inside: _Inside = field(default_factory=_Inside)

    @property
    def actor(self) -> str:
        """Who the audit trail names."""
        return self.worker.id

    @property
    def models(self) -> Resolver:
        """From what jobs call their models to the models on disk."""
        return Resolver(self.database, self.store, self.settings.cache_dir, self.notify)

    def input_rows(self, sources: Mapping[int, Source], slices: Sequence[Slice], schema: pa.Schema) -> InputRows:
        """Rows of a job's input, read in batches as the settings say."""
        settings = self.settings
        return InputRows(self.store, sources, slices, schema, settings.read_batch_rows, settings.read_batch_bytes)

    def register(self) -> None:
        """Make this process known as a worker. Only then may it claim."""
        workers.register(self.database, self.worker)

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Known as a worker inside the block, and afterwards while another thread is inside one.

        The end of the last block frees the jobs that this process may still hold.
        """
        inside = self._inside
        with inside.lock:
            if inside.count == 0:
                self.register()
            inside.count += 1
        try:
            yield
        finally:
            with inside.lock:
                inside.count -= 1
                if inside.count == 0:
                    with suppress(TransientError, CommitUnknown):
                        workers.unregister(self.database, self.worker.id)

    def heartbeat(self) -> None:
        """Say that this process lives; registers it again if it was struck off."""
        if workers.touch(self.database, self.worker.id) is None:
            self.register()

    def close(self) -> None:
        """End the engines and the connections."""
        self.engines.close()
        self.store.close()
        self.database.close()


def start(
    settings: Settings,
    notify: Callable[[str], None] = lambda message: None,
    *,
    engines: Collection[str] = (),
    queues: Collection[str] = (),
    slots: int = 0,
) -> Runtime:
    """Open the database (an embedded one is made or brought up to date) and the object store. Loads no engine.

    ``engines``, ``queues`` and ``slots`` are what a worker of a fleet registers as.
    """
    try:
        settings.cache_dir.mkdir(parents=True, exist_ok=True)
        database = Database(settings.effective_database_url)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InvalidSettings(
            f"the folder {error.filename} cannot be made ({os.strerror(error.errno or 0).lower()}); "
            "set data_dir and cache_dir to folders that can be written"
        ) from error
    database.ensure_schema()
    store = ObjectStore(settings.storage_options)
    fetch = RowFiles(store, settings.uri_prefixes)
    # Reusing cached results is not worth waiting for an unresponsive store.
    keeping = ObjectStore(settings.storage_options, retry_seconds=CACHE_PATIENCE_SECONDS)
    results = ResultCaches(keeping, settings.effective_result_cache, settings.result_index_bytes, notify)
    return Runtime(
        settings=settings,
        database=database,
        store=store,
        engines=EnginePool(
            EngineContext(
                settings.cache_dir,
                notify,
                fetch,
                settings.order_rows,
                settings.order_bytes,
                granted(settings),
                results,
            ),
            settings.max_engines,
            settings.engine_memory_bytes,
        ),
        worker=replace(
            _this_process(),
            engines=tuple(engines),
            queues=tuple(queues),
            slots=slots,
            lease_seconds=settings.lease_seconds,
            offers=registry.host_offers(engines),
        ),
        notify=notify,
    )


def _this_process() -> Worker:
    host, pid = platform.node(), os.getpid()
    worker_id = f"{host}:{pid}:{uuid_utils.uuid4().hex[:8]}"
    boot_id, start_ticks = _started(pid) or (None, None)
    return Worker(
        worker_id,
        host,
        pid,
        psutil.Process(pid).create_time(),
        version=version("rowmill"),
        boot_id=boot_id,
        start_ticks=start_ticks,
    )


def is_alive(worker: Worker) -> bool:
    """Whether the process of a worker on this host still runs (and is not a later one with the same pid)."""
    try:
        process = psutil.Process(worker.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if worker.boot_id is not None and (started := _started(worker.pid)) is not None:
            return started == (worker.boot_id, worker.start_ticks)
        return abs(process.create_time() - worker.pid_started_at) < 1.0
    except psutil.NoSuchProcess:
        return False


def _started(pid: int) -> tuple[str, int] | None:
    """Which boot of this host the process belongs to, and its start in clock ticks since then; ``None`` if unknown.

    psutil gives the wall clock's time of the start, which moves when that clock is set. See proc_pid_stat(5): the name,
    in parentheses, may hold anything; the start is field 22.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return boot_id, int(stat.rpartition(b")")[2].split()[19])
