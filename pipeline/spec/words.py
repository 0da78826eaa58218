"""Numbers, times and text in the words of everything that people read: tables, progress, messages. Pure."""

from __future__ import annotations

import re
import unicodedata

_SIZE = re.compile(r"[1-9][0-9]{0,3}", re.ASCII)


def is_terminal_size(text: str) -> bool:
    """Whether the text can be ``COLUMNS`` or ``LINES`` of a terminal: a whole number from 1 to 9999."""
    return _SIZE.fullmatch(text) is not None


def printable(value: object) -> str:
    """The value as one line that cannot drive a terminal: control characters are shown as escapes."""
    text = "" if value is None else str(value)
    return "".join(c if unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode() for c in text)


def count(number: float) -> str:
    """``12,345``; small rates keep two significant digits (``0.25``, ``3.1``)."""
    if 0 < abs(number) < 10 and number != int(number):
        return f"{number:.2g}"
    return f"{number:,.0f}"


def plural(number: int, noun: str) -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float, *, short: bool = False) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 4 h``; ``short``: the first of the two only."""
    if short:
        return " ".join(duration(seconds).split(" ")[:2])
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
