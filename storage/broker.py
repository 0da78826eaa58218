"""Publishing wake-ups to the broker: "there may be work on this queue".

A wake-up carries nothing and may be lost, doubled or late: the database says what there is to do, and idle workers ask
it by themselves every few seconds. So a broker that does not answer costs latency, never work, and is logged rather
than raised.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from storage.errors import InvalidSettings, Unreachable
from storage.log_actions import Action
from storage.logs import get_logger

if TYPE_CHECKING:
    from celery import Celery

log = get_logger(__name__)

CONTROL_QUEUE = "control"
"""Planning, publishing and maintenance. Shards wait on a queue named after their engine."""
PAUSE_SECONDS = 5.0
"""For how long nothing is sent after the broker did not answer: finding that out may take a thread seconds."""
CONNECT_SECONDS, ANSWER_SECONDS = 2.0, 5.0
"""How long a broker may take to accept a connection, and to answer."""
PLAN, RUN, FINALIZE, TICK = "rowmill.plan", "rowmill.run", "rowmill.finalize", "rowmill.tick"


class Wakeups:
    """Publishes to ``broker_url``; with ``None`` (the embedded mode) there is nobody to wake and nothing happens."""

    def __init__(self, broker_url: str | None) -> None:
        self._app: Celery | None = None
        self._silent_until = 0.0
        if broker_url is not None:
            from celery import Celery

            self._app = Celery("rowmill", broker=broker_url, set_as_current=False)
            self._app.conf.update(
                task_serializer="json",
                task_ignore_result=True,
                task_default_queue=CONTROL_QUEUE,
                broker_connection_timeout=CONNECT_SECONDS,
                broker_transport_options=transport_options(broker_url),
            )

    def plan(self) -> None:
        """A job may wait for its plan."""
        self._send(PLAN, CONTROL_QUEUE, 1)

    def run(self, queue: str, count: int = 1) -> None:
        """Up to ``count`` shards may be ready on ``queue``."""
        self._send(RUN, queue, count)

    def finalize(self) -> None:
        """A job may wait to be published."""
        self._send(FINALIZE, CONTROL_QUEUE, 1)

    def tick(self) -> None:
        """It is time for a round of maintenance.

        It does not expire: Celery would compare this machine's clock with the worker's. Those that pile up cost a
        statement each (``storage.fleet.maintenance_lock``).
        """
        self._send(TICK, CONTROL_QUEUE, 1)

    def check(self) -> None:
        """Whether the broker answers.

        Raises :class:`Unreachable` when it does not, :class:`InvalidSettings` for a URL that no transport knows.
        """
        if self._app is None:
            raise InvalidSettings("no broker is set", field="broker_url")
        from kombu.exceptions import OperationalError

        try:
            with self._app.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, timeout=5)
        except (OperationalError, OSError) as error:
            shown = self._app.connection_for_write().as_uri()  # without its password
            raise Unreachable(f"the broker at {shown} does not answer: {error}") from error
        except (KeyError, ImportError, ValueError, TypeError) as error:
            raise InvalidSettings(f"not a broker that can be used: {error}", field="broker_url") from error
        except Exception as error:  # a client library's own: a database that Redis does not have, a wrong version
            raise Unreachable(f"the broker refuses the connection: {error}") from error

    def _send(self, name: str, queue: str, count: int) -> None:
        if self._app is None or time.monotonic() < self._silent_until:
            return
        args = [queue] if name == RUN else []
        try:
            for _ in range(count):
                self._app.send_task(name, args=args, queue=queue, retry=False)
        except Exception as error:  # whatever its client raises: what there is to do is stored already
            self._silent_until = time.monotonic() + PAUSE_SECONDS
            log.warning(
                "the broker does not answer; workers find the work in the database, a little later: %s",
                error,
                action=Action.BROKER_UNREACHABLE,
            )


def transport_options(broker_url: str) -> dict[str, Any]:
    """How long to wait for a broker that does not answer: options that only Redis understands.

    Everything else that is asked of a broker, each of them can do.
    """
    if broker_url.startswith(("redis", "sentinel")):
        return {"socket_connect_timeout": CONNECT_SECONDS, "socket_timeout": ANSWER_SECONDS}
    return {}
