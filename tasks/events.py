"""What Celery tells onlookers (Flower) of a worker: events that may be lost, and hold up nothing."""

from __future__ import annotations

from typing import Any

from celery.app.events import Events as CeleryEvents
from celery.events.dispatcher import EventDispatcher

from storage.log_actions import Action
from storage.logs import get_logger

log = get_logger(__name__)


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
            log.debug("an event was dropped: %s", error, action=Action.EVENT_DROPPED)


class Events(CeleryEvents):
    """See :class:`Dispatcher`."""

    dispatcher_cls = "tasks.events:Dispatcher"
