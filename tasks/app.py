"""The Celery application: its configuration, and one ``Worker`` per process.

``celery -A tasks.app worker --pool threads --concurrency 2 -Q control,onnx``. The thread pool is not a matter of taste:
a prefork child may have no children of its own, and vLLM's engine is one (docs/adr/0003).
"""

from __future__ import annotations

import threading
from typing import Any

from celery import Celery
from celery.signals import worker_shutdown, worker_shutting_down
from kombu.transport import TRANSPORT_ALIASES

from pipeline.settings import Settings
from pipeline.worker import Worker
from storage.wakeups import CONTROL_QUEUE, TICK

TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), "tasks.redis_transport:Transport"))

settings = Settings()
app = Celery("rowmill", broker=settings.broker_url, include=["tasks.jobs", "tasks.shards", "tasks.beat"])
app.conf.update(
    accept_content=["json"],
    task_serializer="json",
    task_ignore_result=True,
    task_default_queue=CONTROL_QUEUE,
    task_create_missing_queues=True,
    worker_prefetch_multiplier=1,
    worker_pool="threads",
    broker_connection_retry_on_startup=True,
    timezone="UTC",
    beat_schedule={
        "tick": {"task": TICK, "schedule": settings.tick_seconds, "options": {"expires": settings.tick_seconds}}
    },
)

_lock = threading.Lock()
_ending = threading.Event()
_worker: Worker | None = None


def worker() -> Worker:
    """This process's worker, made by the first task that needs it: after any fork, and never in beat."""
    global _worker
    with _lock:
        if _worker is None:
            _worker = Worker(settings)
            threading.Thread(target=_drain, args=(_worker,), name="rowmill-drain", daemon=True).start()
        return _worker


def _drain(worker: Worker) -> None:
    _ending.wait()
    worker.drain()


@worker_shutting_down.connect
def _begin_to_end(**_: Any) -> None:
    # Celery waits for the running tasks before it announces the shutdown itself, and a shard may take hours. This is
    # called in the signal's handler, where setting an event is about all that is safe.
    _ending.set()


@worker_shutdown.connect
def _close(**_: Any) -> None:
    if _worker is not None:
        _worker.close()
