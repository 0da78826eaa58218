"""What Celery tells onlookers (Flower) of a worker: events that may be lost, and hold up nothing."""

from __future__ import annotations

import logging
from typing import Any

from celery.app.events import Events as CeleryEvents
from celery.events.dispatcher import EventDispatcher

log = logging.getLogger(__name__)


class Dispatcher(EventDispatcher):
    """Drops an event when the broker does not answer.

    Celery would try again for ever, in the loop that listens to the broker and to the signals that end the worker.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.buffer_while_offline = False

    def _publish(self, event: Any, producer: Any, routing_key: str, **_: Any) -> None:
        try:
            super()._publish(event, producer, routing_key, retry=False)  # type: ignore[misc]
        except Exception as error:
            log.debug("an event was dropped: %s", error)


class Events(CeleryEvents):
    """See :class:`Dispatcher`."""

    dispatcher_cls = "tasks.events:Dispatcher"
