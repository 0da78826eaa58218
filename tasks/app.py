"""The Celery application: its configuration, and one ``Worker`` per process.

``rowmill worker start`` runs it (tasks/worker.py). By hand: ``celery -A tasks.app worker --pool threads --concurrency 2
-Q control,onnx``. The thread pool is not a matter of taste: a prefork child may have no children of its own, and vLLM's
engine is one (docs/adr/0003).
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from typing import Any

from celery import Celery
from celery.signals import after_setup_logger, after_setup_task_logger, worker_shutdown, worker_shutting_down
from celery.worker import state
from kombu.transport import TRANSPORT_ALIASES
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_fixed

from pipeline.config.settings import Settings
from pipeline.engines import registry
from pipeline.worker.worker import Worker
from storage import logs
from storage.broker import CONTROL_QUEUE, TICK, transport_options
from storage.errors import TransientError
from storage.log_actions import Action
from storage.logs import get_logger
from tasks import redis_transport

TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), "tasks.redis_transport:Transport"))
TRANSPORT_ALIASES["sentinel"] = "tasks.redis_transport:SentinelTransport"

settings = Settings()
app = Celery(
    "rowmill",
    broker=settings.broker_url,
    events="tasks.events:Events",
    include=["tasks.wakeups"],
)
app.conf.update(
    accept_content=["json"],
    task_serializer="json",
    task_ignore_result=True,
    task_default_queue=CONTROL_QUEUE,
    task_create_missing_queues=True,
    worker_prefetch_multiplier=1,
    worker_pool="threads",
    worker_consumer="tasks.consumer:Consumer",
    worker_enable_remote_control=False,  # whoever can write to the broker must not be able to stop a worker
    worker_send_task_events=True,  # for Flower
    worker_redirect_stdouts=False,
    # For as long as it takes: work is found in the database meanwhile.
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_channel_error_retry=True,
    broker_transport_options=transport_options(settings.broker_url or ""),
    timezone="UTC",
    # Without ``expires``, which would compare beat's clock with the worker's; what piles up is dropped by
    # ``storage.fleet.maintenance_lock``.
    beat_schedule={"tick": {"task": TICK, "schedule": settings.tick_seconds}},
)

log = get_logger(__name__)

_DATABASE_SECONDS = 5
"""From one try to the next while a worker that begins cannot reach the database."""
_NOHUP = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
_lock = threading.Lock()
_signals: queue.SimpleQueue[None] = queue.SimpleQueue()
"""One item for each signal to end. Its ``put`` may be called in a signal's handler, unlike that of other queues."""
_role: dict[str, Any] = {}
_worker: Worker | None = None


def configure(**role: Any) -> None:
    """What the ``Worker`` says of itself: ``engines``, ``queues``, ``slots``. Before the first :func:`worker`."""
    _role.update(role)


def worker() -> Worker:
    """This process's worker, made by the first who needs it: after any fork, and never in beat."""
    global _worker
    with _lock:
        if _worker is None:
            _worker = Worker(settings, on_drain=lambda: os.kill(os.getpid(), signal.SIGTERM), **_role)
            threading.Thread(target=_end, args=(_worker,), name="rowmill-drain", daemon=True).start()
        return _worker


def _end(worker: Worker) -> None:
    _signals.get()
    worker.drain()
    _signals.get()
    worker.flush()


@after_setup_logger.connect
@after_setup_task_logger.connect
def _format_logs(logger: logging.Logger, **_: Any) -> None:
    logs.format_as(settings.log_format, logger.handlers)


def begin(consumer: Any) -> None:
    """Take the signals, and look for work from now on, whether the broker answers or not. By Celery's consumer."""
    # Celery's own handlers would treat a second signal in ways that lose what is finished (and SIGINT otherwise than
    # SIGTERM): here the first one drains, the next one flushes at once.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, _asked_to_end)
    # Celery would start itself anew in its place.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if _NOHUP else _asked_to_end)
    if not _role:
        consumed = tuple(consumer.app.amqp.queues.consume_from)
        kinds = tuple(name for name in consumed if name in registry.names())
        slots = consumer.controller.concurrency if any(name != CONTROL_QUEUE for name in consumed) else 0
        _role.update(engines=kinds, queues=consumed, slots=slots)
    mine = _worker_once_the_database_answers()
    redis_transport.on_messages(mine.drop_message, lambda: mine.takes_messages)
    mine.start()


def _worker_once_the_database_answers() -> Worker:
    def tell(tried: RetryCallState) -> None:
        error = tried.outcome.exception() if tried.outcome else None
        log.warning("this worker begins once the database answers: %s", error, action=Action.DATABASE_AWAITED)

    answered = retry_if_exception_type(TransientError)
    return Retrying(retry=answered, wait=wait_fixed(_DATABASE_SECONDS), sleep=pause, before_sleep=tell)(worker)


def pause(seconds: float) -> None:
    """Sleep for whole seconds, unless this process is to end."""
    for _ in range(int(seconds)):
        state.maybe_shutdown()
        time.sleep(1)


def _asked_to_end(number: int, frame: Any) -> None:
    # Celery's warm shutdown: take no more tasks, wait for those that run, end with this code.
    setattr(state, "should_stop", 0)  # noqa: B010 - the stubs have it as None
    _signals.put(None)


@worker_shutting_down.connect
def _begin_to_end(**_: Any) -> None:
    # A signal that Celery's own handler took, before it began to listen.
    _signals.put(None)


@worker_shutdown.connect
def close(**_: Any) -> None:
    """End the ``Worker``, if there is one, once its shards have finished or their grace is over."""
    global _worker
    with _lock:
        ended, _worker = _worker, None
    if ended is not None:
        ended.close()
