"""Kombu's Redis transport, with one error named for what it is.

A worker that acknowledges or gives back a message after its broker connection was closed asks that connection for its
address, and Kombu 5.7 answers with ``AttributeError``. Celery takes that for a defect and ends the process, although it
would reconnect after a connection error (seen when a chaos run restarted Redis: each worker died within minutes).
"""

from __future__ import annotations

from typing import Any

from kombu.transport import redis


class Channel(redis.Channel):
    """See the module."""

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if self.connection is None or self.connection.client is None:
            raise ConnectionError("the connection to the broker was closed")
        return dict(super()._connparams(asynchronous))  # type: ignore[misc]


class Transport(redis.Transport):
    """See the module."""

    Channel = Channel
