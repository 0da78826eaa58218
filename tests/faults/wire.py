"""A TCP proxy between a client and PostgreSQL that breaks the connection at one COMMIT, before or after it lands."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum

_COMMIT = b"COMMIT\x00"
_READY_FOR_QUERY = b"Z\x00\x00\x00\x05"


class Cut(StrEnum):
    """When the connection breaks."""

    BEFORE = "before"
    """COMMIT does not reach the server, which rolls back."""
    AFTER = "after"
    """COMMIT takes effect, and its answer is lost."""
    LATE = "late"
    """The connection breaks first; COMMIT takes effect when :attr:`Wire.landing` returns."""


class Wire:
    """``port`` stands for the server's. Cuts once: at the first COMMIT of a transaction that has sent ``marker``."""

    def __init__(self) -> None:
        self.port = 0
        self.cut: Cut | None = None
        self.marker = b""
        self.landing: Callable[[], object] = lambda: None
        self.cuts = 0
        self._lock = threading.Lock()

    def plan(self, cut: Cut, marker: bytes) -> None:
        """Cut the connection at the COMMIT that comes next after ``marker`` was sent on it."""
        self.cut, self.marker = cut, marker

    def take(self) -> Cut | None:
        """The planned cut, for one caller."""
        with self._lock:
            cut, self.cut = self.cut, None
            self.cuts += cut is not None
            return cut


class _Link(threading.Thread):
    """One client's connection: this thread passes on what the client sends, another what the server answers."""

    def __init__(self, wire: Wire, client: socket.socket, server: socket.socket) -> None:
        super().__init__(daemon=True)
        self._wire, self._client, self._server = wire, client, server
        self._muted = threading.Event()
        self._answered = threading.Event()
        self._back = threading.Thread(target=self._answers, daemon=True)
        self._back.start()

    def run(self) -> None:
        marked = False
        with suppress(OSError):
            while data := self._client.recv(65536):
                marked |= self._wire.cut is not None and self._wire.marker in data
                if marked and _COMMIT in data:
                    marked = False
                    cut = self._wire.take()
                    if cut is not None:
                        self._break(cut, data)
                        return
                self._server.sendall(data)
        self.close()

    def _break(self, cut: Cut, data: bytes) -> None:
        self._muted.set()
        if cut is Cut.LATE:
            _hang_up(self._client)
            self._wire.landing()
        if cut is not Cut.BEFORE:
            self._server.sendall(data)
            self._answered.wait(60)
        self.close()

    def _answers(self) -> None:
        with suppress(OSError):
            while data := self._server.recv(65536):
                if not self._muted.is_set():
                    self._client.sendall(data)
                elif _READY_FOR_QUERY in data:
                    self._answered.set()
        _hang_up(self._client)

    def close(self) -> None:
        _hang_up(self._server)
        _hang_up(self._client)


def _hang_up(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@contextmanager
def wire(port: int) -> Iterator[Wire]:
    """A running proxy before the server at ``port`` of the loopback address."""
    made = Wire()
    links: list[_Link] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made.port = listener.getsockname()[1]

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    links.append(_Link(made, client, socket.create_connection(("127.0.0.1", port))))
                    links[-1].start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield made
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for link in links:
                link.close()
