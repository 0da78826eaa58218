"""Kombu's Redis transport, for messages that may be lost and must not be trusted.

* A message that is not one of ours never reaches Kombu, which would raise somewhere inside: it is dropped.
* Nothing is acknowledged, kept aside or given back: a worker that dies with a wake-up in its hands costs a few seconds.
  So no message that ends a worker can come back and end the next one.
* A worker whose slots are all busy takes no messages, and leaves them to others.
* A worker that answers for a message after its broker connection was closed asks that connection for its address, and
  Kombu 5.7 answers with ``AttributeError``. Here that is the connection error that it is.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty
from typing import Any

from kombu.transport import redis

from tasks.messages import Malformed, check_envelope

_PASSED_ON: tuple[type[Exception], ...] = (*redis.Transport.connection_errors, *redis.Transport.channel_errors, Empty)


class _Hooks:
    """What the process does with messages; ``tasks.app`` sets it. A process that only sends does nothing."""

    dropped: Callable[[str], None] = staticmethod(lambda reason: None)
    wanted: Callable[[], bool] = staticmethod(lambda: True)


class QoS(redis.QoS):
    """See the module."""

    restore_at_shutdown = False

    def can_consume(self) -> bool:
        return _Hooks.wanted()

    def append(self, message: Any, delivery_tag: Any) -> None:
        pass

    def ack(self, delivery_tag: Any) -> None:
        pass

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        pass

    def restore_visible(self, *_: Any, **__: Any) -> None:
        pass


class _Channel(redis.Channel):
    """See the module."""

    QoS = QoS

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except _PASSED_ON:
            raise
        except Exception as error:  # it is no text, no JSON, or nested too deep; Redis has handed it over for good
            _Hooks.dropped(f"it cannot be read: {type(error).__name__}")
            return True

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if self.connection is None or self.connection.client is None:
            raise ConnectionError("the connection to the broker was closed")
        return dict(super()._connparams(asynchronous))  # type: ignore[misc]


class Channel(_Channel):
    """Of one Redis server."""


class SentinelChannel(_Channel, redis.SentinelChannel):
    """Of the server that Redis Sentinel names."""


class _Transport(redis.Transport):
    """See the module."""

    def _deliver(self, message: Any, queue: Any) -> None:
        if queue not in (self._callbacks or {}):
            return  # this worker ends, and listens no more; the others look by themselves
        try:
            check_envelope(message)
        except Malformed as error:
            _Hooks.dropped(str(error))
        else:
            super()._deliver(message, queue)


class Transport(_Transport):
    """``redis://``, ``rediss://``"""

    Channel = Channel


class SentinelTransport(_Transport, redis.SentinelTransport):
    """``sentinel://``"""

    Channel = SentinelChannel


def on_messages(dropped: Callable[[str], None], wanted: Callable[[], bool]) -> None:
    """Call ``dropped`` with the reason for each dropped message, and take messages only while ``wanted`` says so."""
    setattr(_Hooks, "dropped", staticmethod(dropped))  # noqa: B010
    setattr(_Hooks, "wanted", staticmethod(wanted))  # noqa: B010
