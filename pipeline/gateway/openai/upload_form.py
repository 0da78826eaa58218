"""The multipart body of an upload, taken from the stream: its file goes on to a sink in parts, and is never held."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from pipeline.gateway.errors import ApiError

_MOST_FIELD_BYTES = 64 * 2**10
_MOST_FIELDS = 64
_NOT_A_NAME = re.compile(r"[\x00-\x1f\x7f]")


class UploadForm:
    """Feed it the body with :meth:`feed`, then :meth:`end`.

    ``sink`` takes the content of the field ``file``. ``most_bytes``: of that. ``fields`` are the other fields, by name;
    ``filename`` is ``None`` until the file began. Raises :class:`ApiError`.
    """

    def __init__(self, content_type: str, sink: Callable[[bytes], object], most_bytes: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError(400, "send the file as multipart/form-data", code="invalid_content_type")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.n_bytes = 0
        self._sink, self._most = sink, most_bytes
        self._text = codecs.getincrementaldecoder("utf-8")()
        self._ended = False
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._field: tuple[str, bytearray] | None = None
        callbacks: dict[str, Any] = {
            "on_part_begin": self._part_begins,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_ends,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._part_data,
            "on_part_end": self._part_ends,
            "on_end": self._all_ends,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        except MultipartParseError as error:
            raise _malformed(error) from error

    def feed(self, data: bytes) -> None:
        """Take the next piece of the body."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise _malformed(error) from error

    def end(self) -> None:
        """The body has ended: it must have been whole, and hold a file."""
        if not self._ended:
            raise ApiError(400, "the body ended before the form did; send it again", code="invalid_form")
        if self.filename is None:
            raise ApiError(400, "file is required", code="missing_required_parameter", param="file")

    def _part_begins(self) -> None:
        self._disposition, self._field = b"", None

    def _header_ends(self) -> None:
        name, value = (bytes(part) for part in self._header)
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = (bytearray(), bytearray())

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        if name == "file":
            if self.filename is not None:
                raise ApiError(400, "give one file", code="invalid_value", param="file")
            self.filename = file_name(options.get(b"filename", b"").decode(errors="replace"))
            return
        if name in self.fields or len(self.fields) >= _MOST_FIELDS:
            raise ApiError(400, f"the field {name[:64]!r} is given twice, or there are too many", code="invalid_form")
        self._field = (name, bytearray())
        self.fields[name] = ""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is not None:
            self._field[1].extend(data[start:end])
            if len(self._field[1]) > _MOST_FIELD_BYTES:
                raise ApiError(400, f"{self._field[0][:64]} is too long", code="invalid_value", param=self._field[0])
            return
        piece = data[start:end]
        self.n_bytes += len(piece)
        if self.n_bytes > self._most:
            raise ApiError(413, f"the file is larger than {self._most:,} bytes", code="file_too_large", param="file")
        self._decode(piece)
        self._sink(piece)

    def _part_ends(self) -> None:
        if self._field is not None:
            name, value = self._field
            try:
                self.fields[name] = value.decode()
            except UnicodeDecodeError:
                raise ApiError(400, f"{name} is not UTF-8", code="invalid_value", param=name) from None
        else:
            self._decode(b"", final=True)

    def _all_ends(self) -> None:
        self._ended = True

    def _decode(self, piece: bytes, *, final: bool = False) -> None:
        try:
            self._text.decode(piece, final)
        except UnicodeDecodeError:
            message = f"the file is not UTF-8, near byte {max(0, self.n_bytes - len(piece)):,}"
            raise ApiError(400, message, code="invalid_file", param="file") from None


def file_name(given: str) -> str:
    """The label of a file, without folders. Raises :class:`ApiError` for one that says it is no JSONL."""
    name = _NOT_A_NAME.sub("", given.replace("\\", "/").rpartition("/")[2])[:255] or "file"
    stem, dot, ending = name.rpartition(".")
    if dot and stem and ending.lower() != "jsonl":
        raise ApiError(400, f"a batch file's name ends in .jsonl, not in .{ending}", code="invalid_value", param="file")
    return name


def _malformed(error: Exception) -> ApiError:
    return ApiError(400, f"the form is malformed: {error}", code="invalid_form")
