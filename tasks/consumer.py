"""Celery's consumer as a mere listener: whatever goes wrong with the broker or with a message, the worker lives.

The work itself does not pass through here: the worker's own threads look for it in the database
(``pipeline.worker.worker``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer

from storage.log_actions import Action
from storage.logs import get_logger
from tasks import app as celery_app
from tasks.messages import Malformed, check_task

log = get_logger(__name__)

_LONGEST_PAUSE_SECONDS = 30
"""Before it listens again after an error other than a broken connection: that one may come back at once."""


class Consumer(CeleryConsumer):
    """Without what would let a message stop or change a worker: remote control, talk between workers."""

    connection_errors: tuple[type[BaseException], ...]
    task_consumer: Any

    def __init__(self, *arguments: Any, worker_options: dict[str, Any] | None = None, **more: Any) -> None:
        more["worker_options"] = (worker_options or {}) | {"without_mingle": True, "without_gossip": True}
        super().__init__(*arguments, **more)
        self._broken, self._pause, self._failed_at = self.connection_errors, 1, float("-inf")
        # Celery connects anew after these, and ends the process after any other. Those that end it on purpose are no
        # ``Exception``.
        self.connection_errors = (Exception,)

    def start(self) -> None:
        celery_app.begin(self)
        super().start()

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        try:
            super().on_connection_error_after_connected(exc)
        except Exception:
            log.exception("the old connection to the broker could not be closed", action=Action.BROKER_CLOSE_FAILED)
        if isinstance(exc, self._broken):
            return
        lately = time.monotonic() - self._failed_at < 2 * _LONGEST_PAUSE_SECONDS
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS) if lately else 1
        log.error(
            "listening to the broker failed, again in %d s; work is found in the database: %r",
            self._pause,
            exc,
            action=Action.BROKER_DISCONNECTED,
        )
        celery_app.pause(self._pause)
        self._failed_at = time.monotonic()

    def create_task_handler(self, *arguments: Any, **more: Any) -> Callable[[Any], None]:
        self.task_consumer.no_ack = True  # lost is better than back on the queue (tasks/redis_transport.py)
        handle = super().create_task_handler(*arguments, **more)

        def checked(message: Any) -> None:
            try:
                check_task(message.headers, message.content_type, message.content_encoding, message.body)
            except Malformed as error:
                celery_app.worker().drop_message(str(error))
            else:
                handle(message)

        return checked

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        celery_app.worker().drop_message(f"it cannot be decoded: {type(exc).__name__}")
