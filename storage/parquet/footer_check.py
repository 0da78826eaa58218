"""Looks at Parquet footers in a child process, because a bad one ends the process that looks.

pyarrow cannot raise an error for the metadata of a column chunk: a chunk that is encrypted, or that lacks its metadata,
aborts the process (C++ ``terminate``). The child is started for the first footer and ends when it has been idle.
"""

from __future__ import annotations

import io
import os
import resource
import selectors
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO

_IDLE_SECONDS = 30.0
_LENGTH = struct.Struct("<Q")
_TAIL = 8
"""Bytes at the end of a Parquet file: the length of the footer, and the magic number."""
_ENCRYPTED = b"PARE"
_IDLE = 0
_OK = b"\1"


def is_safe(footer: bytes) -> bool:
    """Whether the metadata of every column chunk can be looked at. ``footer`` is a file's end: see :func:`raw_footer`.

    Safe to call from several threads; they take turns.
    """
    with _lock:
        while True:
            child = _running()
            assert child.stdin is not None and child.stdout is not None
            # A child that has just ended is not there to take the footer.
            with suppress(BrokenPipeError):
                child.stdin.write(_LENGTH.pack(len(footer)) + footer)
                child.stdin.flush()
            if child.stdout.read(1) == _OK:
                return True
            if child.wait() != _IDLE:
                return False


def is_encrypted(file: IO[bytes]) -> bool:
    """Whether the footer itself of an open file is encrypted."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - len(_ENCRYPTED)))
    return file.read() == _ENCRYPTED


def raw_footer(file: IO[bytes]) -> bytes:
    """The bytes of an open Parquet file from its footer on."""
    size = file.seek(0, os.SEEK_END)
    file.seek(size - _TAIL)
    (length,) = struct.unpack("<I4x", file.read(_TAIL))
    file.seek(max(0, size - _TAIL - length))
    return file.read()


_lock = threading.Lock()
_child: subprocess.Popen[bytes] | None = None


def _running() -> subprocess.Popen[bytes]:
    global _child
    if _child is None or _child.poll() is not None:
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        # -P: no module beside this file is taken for another one. In a session of its own: Ctrl-C is for the parent.
        command = [sys.executable, "-P", __file__]
        _child = subprocess.Popen(  # noqa: S603
            command, stdin=pipe, stdout=pipe, stderr=nowhere, start_new_session=True
        )
    return _child


def _after_fork() -> None:
    """The child is the parent's."""
    global _child, _lock
    _child, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _serve() -> None:
    """The child: answers one byte for each footer, until its parent has gone or is silent."""
    import pyarrow.parquet as pq

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    while selector.select(_IDLE_SECONDS) and (length := _exactly(_LENGTH.size)):
        footer = _exactly(*_LENGTH.unpack(length))
        metadata = pq.read_metadata(io.BytesIO(b"PAR1" + footer))
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            for index in range(group.num_columns):
                group.column(index)
        os.write(1, _OK)


def _exactly(count: int) -> bytes:
    """The next ``count`` bytes of stdin; empty at its end."""
    found = bytearray()
    while len(found) < count:
        more = os.read(0, min(count - len(found), 2**20))
        if not more:
            return b""
        found += more
    return bytes(found)


if __name__ == "__main__":
    _serve()
