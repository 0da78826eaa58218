"""Serving the application on a socket until the process is asked to end."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator

import uvicorn

from pipeline.config.settings import Settings
from pipeline.gateway.app import create_app
from storage.errors import InvalidSettings


class Server(uvicorn.Server):
    """Uvicorn, with the signals left to the command; ``stop`` may be called from any thread."""

    def __init__(self, settings: Settings, listener: socket.socket, *, embedded: bool, ready: Callable[[], None]):
        super().__init__(
            uvicorn.Config(
                create_app(settings, embedded=embedded),
                loop="asyncio",  # uvloop takes the signals for itself
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=max(1, round(settings.drain_grace_seconds)),
            )
        )
        self._listener, self._ready = listener, ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn: it would end the process by the signal."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    def serve_here(self) -> bool:
        """Serve until :meth:`stop`; whether it could start."""
        self.run(sockets=[self._listener])
        return self.started

    def stop(self) -> None:
        """Take no more requests, and let those that run end."""
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any free one. Raises :class:`InvalidSettings` naming what is wrong."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise InvalidSettings(
            f"cannot listen on {host} port {port} ({reason.lower()}); choose another --host or --port"
        ) from error


def check(settings: Settings, listener: socket.socket, *, embedded: bool) -> None:
    """Refuse settings under which nothing would run a job, or anybody could. Raises :class:`InvalidSettings`."""
    if settings.broker_url is None and not embedded:
        raise InvalidSettings(
            "without a broker nobody would run the jobs: --embedded runs them in this process; for a fleet set "
            "ROWMILL_BROKER_URL, as its workers have it",
            field="broker_url",
        )
    if settings.broker_url is not None and embedded:
        raise InvalidSettings(
            "workers run the jobs where a broker is set; leave out --embedded, or the broker", field="broker_url"
        )
    if settings.api_auth == "off":
        address = ipaddress.ip_address(listener.getsockname()[0])
        if not (embedded and address.is_loopback):
            raise InvalidSettings(
                "keys can be off only with --embedded on a loopback address such as 127.0.0.1; "
                "'rowmill key create' makes a key",
                field="api_auth",
            )


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine finds it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
