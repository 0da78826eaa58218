"""A proxy before the S3 endpoint that answers the requests it is told to with faults, as a real service would."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CUT = 0
CUT_AFTER = -1
STALL = -2
TRUNCATE = -3
IGNORE = -4


@dataclass(frozen=True, slots=True)
class Request:
    """``n_bytes``: length of the body that the real endpoint answered with."""

    method: str
    path: str
    range: str | None
    n_bytes: int


class Faults:
    """``script`` is asked with (method, path) of each request what to do: ``None`` to let it pass, a status to answer
    with, ``CUT`` to hang up at once, ``CUT_AFTER`` to let it take effect and hang up without an answer; of the answer's
    body, ``STALL`` sends the first half and then nothing till the client hangs up, ``TRUNCATE`` hangs up itself.

    ``conditional`` is the status that puts with ``If-None-Match`` are answered with, or ``IGNORE``: the store does not
    know the header. ``requests`` are those that reached the endpoint, in order.
    """

    def __init__(self) -> None:
        self.script: Callable[[str, str], int | None] = lambda method, path: None
        self.conditional: int | None = None
        self.injected = 0
        self.code: str | None = None
        self.requests: list[Request] = []
        self.endpoint = ""

    def next(self, status: int, *, method: str, times: int = 1, code: str | None = None) -> None:
        """Answer the next ``times`` requests of ``method`` with ``status`` (and another error code than its usual)."""
        self.code = code
        left = times

        def script(asked: str, path: str) -> int | None:
            nonlocal left
            if asked != method or left == 0:
                return None
            left -= 1
            return status

        self.script = script


_CODES = {
    503: "SlowDown", 500: "InternalError", 429: "TooManyRequests", 403: "AccessDenied",
    409: "ConditionalRequestConflict", 412: "PreconditionFailed", 501: "NotImplemented",
}  # fmt: skip


@contextmanager
def proxy(endpoint: str) -> Iterator[Faults]:
    """A running proxy; its ``endpoint`` stands for the real one."""
    faults = Faults()
    target = urlsplit(endpoint)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status = faults.script(self.command, self.path)
            if faults.conditional is not None and self.headers.get("If-None-Match"):
                status = faults.conditional
                if status == IGNORE:
                    status = None
                    del self.headers["If-None-Match"]
            if status is not None:
                faults.injected += 1
                self.close_connection = True
                if status == CUT_AFTER:
                    self._forward(body)
                if status in (CUT, CUT_AFTER):
                    self.connection.close()
                    return
                if status in (STALL, TRUNCATE):
                    self._half(status)
                    return
                code = faults.code or _CODES[status]
                answer = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)
                return
            reply, data = self._forward(body)
            self.send_response(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            length = reply.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _half(self, status: int) -> None:
            reply, data = self._forward(b"")
            self.send_response(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if status == STALL:
                self.connection.recv(1)

        def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
            connection = http.client.HTTPConnection(target.hostname or "", target.port)
            try:
                connection.request(self.command, self.path, body, dict(self.headers))
                reply = connection.getresponse()
                data = reply.read()
                faults.requests.append(Request(self.command, self.path, self.headers.get("Range"), len(data)))
                return reply, data
            finally:
                connection.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _relay  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    faults.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield faults
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
