"""A file that is one JSON array, as JSON Lines: one element after another, in bounded memory."""

from __future__ import annotations

import codecs
import io
import json
import re
from enum import Enum, auto
from typing import Any

from pipeline.spec.json_text import TooDeep
from storage.errors import InvalidInput

_BLOCK = 2**20
_PEEKED = 4096
_NEAR_THE_END = 16
"""Characters before the end of what was read within which an error may only mean that more is to come."""
_WHITE = re.compile(r"[ \t\r\n]*")
_DELIMITERS = " \t\r\n,]"
_decode = json.JSONDecoder().raw_decode


class _Awaits(Enum):
    BRACKET = auto()
    FIRST = auto()
    ELEMENT = auto()
    COMMA = auto()
    NOTHING = auto()


def as_lines(stream: Any, uri: str, most: int) -> Any:
    """``stream``; or, where it begins with ``[``, a reader over the elements of the array, each on a line of its own.

    ``stream`` is an ``io.BufferedReader`` over UTF-8. The reader's ``read`` raises :class:`InvalidInput`, naming the
    element by its number, for what is no array, and for an element of more than ``most`` characters.
    """
    if not stream.peek(_PEEKED).lstrip().startswith(b"["):
        return stream
    return io.BufferedReader(_Elements(stream, uri, most), _BLOCK)


class _Elements(io.RawIOBase):
    def __init__(self, stream: Any, uri: str, most: int) -> None:
        self._stream, self._uri, self._most = stream, uri, most
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._awaits, self._number = _Awaits.BRACKET, 0
        self._text, self._ended = "", False
        self._lines = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._lines and not self._ended:
            self._advance()
        n = min(len(buffer), len(self._lines))
        buffer[:n], self._lines = self._lines[:n], self._lines[n:]
        return n

    def _advance(self) -> None:
        """Read on, and turn the elements that are whole into lines."""
        chunk = self._stream.read(max(_BLOCK, len(self._text)))
        self._ended = not chunk
        text = self._text + self._decoder.decode(chunk, final=self._ended)
        lines: list[str] = []
        at = _past_white(text, 0)
        while at < len(text):
            end = self._step(text, at, lines)
            if end is None:
                break
            at = _past_white(text, end)
        self._text = text[at:]
        if len(self._text) > self._most:
            raise self._refusal(f"longer than {self._most // 2**20} MiB")
        if self._ended and self._awaits is not _Awaits.NOTHING:
            raise self._refusal("the file ends within the array")
        self._lines = memoryview("".join(lines).encode("utf-8", "surrogateescape"))

    def _step(self, text: str, at: int, lines: list[str]) -> int | None:
        """Take what begins at ``at``; returns where it ends, or ``None`` where more has to be read."""
        char = text[at]
        match self._awaits:
            case _Awaits.NOTHING:
                raise self._refusal("there is more after the array; write one JSON object per line")
            case _Awaits.BRACKET:
                self._awaits = _Awaits.FIRST
            case _Awaits.COMMA if char == ",":
                self._awaits = _Awaits.ELEMENT
            case _Awaits.COMMA | _Awaits.FIRST if char == "]":
                self._awaits = _Awaits.NOTHING
            case _Awaits.COMMA:
                raise self._refusal("it is followed by neither a comma nor the array's end")
            case _:
                end = self._end_of_element(text, at)
                if end is not None:
                    # A line break inside an element is white space: strings hold none.
                    lines.append(text[at:end].replace("\n", " ").replace("\r", " ") + "\n")
                    self._awaits, self._number = _Awaits.COMMA, self._number + 1
                return end
        return at + 1

    def _end_of_element(self, text: str, at: int) -> int | None:
        try:
            _, end = _decode(text, at)
        except RecursionError:
            raise self._refusal(str(TooDeep()), 1) from None
        except json.JSONDecodeError as error:
            cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(text) - _NEAR_THE_END
            if cut_off and not self._ended:
                return None
            raise self._refusal(error.msg, 1) from None
        except ValueError as error:  # a number of thousands of digits
            raise self._refusal(str(error), 1) from None
        # A number may go on in what is still to be read: 1, 1., 1.5, 1.5e, 1.5e3.
        whole = end < len(text) and (text[end] in _DELIMITERS or end < len(text) - _NEAR_THE_END)
        return end if whole or self._ended else None

    def _refusal(self, why: str, following: int = 0) -> InvalidInput:
        return InvalidInput(f"{self._uri}, element {self._number + following} of the array: {why}", field="input")


def _past_white(text: str, at: int) -> int:
    found = _WHITE.match(text, at)
    return found.end() if found else at
