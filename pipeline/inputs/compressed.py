"""A text file's bytes as UTF-8: decompressed and decoded on the way."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pyarrow as pa

from storage.errors import InvalidInput
from storage.objects.store import ObjectStore
from storage.parquet.batches import readable

Codec = Literal["gzip", "zstd"]
_BLOCK = 2**20
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Longer marks first: that of UTF-32 begins with that of UTF-16."""


@contextmanager
def opened(store: ObjectStore, uri: str, compression: Codec | None, encoding: str | None = None) -> Iterator[Any]:
    """A reader (``read(n)``, also for pyarrow) over the text of ``uri``, in UTF-8 and without a byte order mark.

    Without ``encoding`` a byte order mark decides. Without one the bytes are handed on unchanged: they are UTF-8, or
    the rows that hold others get an error. Raises :class:`InvalidInput` for bytes that the encoding does not have,
    here or in ``read``, and ``OSError`` for bad compression.
    """
    with store.open(uri) as opened_file:
        file: Any = opened_file
        if compression is None:
            yield _decoded(file, uri, encoding)
        else:
            with pa.CompressedInputStream(file, compression) as stream:
                yield _decoded(stream, uri, encoding)


def _decoded(stream: Any, uri: str, encoding: str | None) -> Any:
    with readable(uri, InvalidInput, "it cannot be decompressed"):
        head = b""
        while len(head) < 4 and (more := bytes(stream.read(4 - len(head)))):
            head += more
    mark, found = next(((mark, name) for mark, name in _MARKS if head.startswith(mark)), (b"", None))
    if encoding is None or encoding == "utf-8":
        if found is None and (guess := _without_mark(head)) is not None:
            raise InvalidInput(
                f"{uri} is not UTF-8: it looks like {guess.upper()} without a byte order mark; say so with encoding "
                f"(--encoding {guess})",
                field="encoding",
            )
        if found in (None, "utf-8"):
            return io.BufferedReader(_Bytes(stream, head.removeprefix(mark)), _BLOCK)
        encoding = found
    assert encoding is not None
    return io.BufferedReader(_Decoder(stream, head, uri, encoding), _BLOCK)


def _without_mark(head: bytes) -> str | None:
    """UTF-16 and UTF-32 spell the ASCII characters that every table begins with by zeros, UTF-8 does not."""
    zeros: tuple[bool, ...] = tuple(byte == 0 for byte in head)
    known: dict[tuple[bool, ...], str] = {
        (False, True, False, True): "utf-16-le",
        (True, False, True, False): "utf-16-be",
        (False, True, True, True): "utf-32-le",
        (True, True, True, False): "utf-32-be",
    }
    return known.get(zeros)


class _Bytes(io.RawIOBase):
    """A stream that somebody else closes, with bytes that were read ahead put back."""

    def __init__(self, stream: Any, head: bytes) -> None:
        super().__init__()
        self._stream, self._rest = stream, head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and self._more():
            pass
        data, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    def _more(self) -> bool:
        """Put what comes next into ``_rest``; false at the end."""
        self._rest = bytes(self._stream.read(_BLOCK))
        return bool(self._rest)


class _Decoder(_Bytes):
    """The same, turned into UTF-8."""

    def __init__(self, stream: Any, head: bytes, uri: str, encoding: str) -> None:
        super().__init__(stream, b"")
        self._uri, self._encoding, self._head = uri, encoding, head
        self._codec = codecs.getincrementaldecoder(encoding)()
        self._at, self._first, self._ended = 0, True, False

    def _more(self) -> bool:
        if self._ended:
            return False
        data, self._head = self._head + bytes(self._stream.read(_BLOCK)), b""
        self._ended = not data
        try:
            text = self._codec.decode(data, final=self._ended)
        except UnicodeError as error:
            raise InvalidInput(
                f"{self._uri} is not {self._encoding} ({error}, after {self._at:,} bytes); give its encoding "
                "(--encoding)",
                field="encoding",
            ) from error
        self._at += len(data)
        if text and self._first:
            text, self._first = text.removeprefix("\ufeff"), False
        self._rest = text.encode("utf-8", "surrogatepass")
        return not self._ended or bool(self._rest)
