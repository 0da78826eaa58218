"""Celery's events while the broker does not answer."""

from __future__ import annotations

from celery import Celery
from celery.events.dispatcher import EventDispatcher

from tasks.events import Dispatcher


def test_an_event_that_cannot_be_sent_is_dropped() -> None:
    """Celery sends its heartbeats with ``retry=True``, and would not come back before the broker does."""
    app = Celery(broker="redis://127.0.0.1:9/0", events="tasks.events:Events", set_as_current=False)
    with app.connection_for_write() as connection:
        dispatcher = app.events.Dispatcher(connection, hostname="here")
        assert isinstance(dispatcher, Dispatcher) and isinstance(dispatcher, EventDispatcher)
        dispatcher.send("worker-heartbeat", retry=True)
        dispatcher.flush()
        assert not dispatcher._outbound_buffer, "nothing gathers while the broker is away"
