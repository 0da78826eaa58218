"""Data on stdout: JSON documents, tables, and the words for numbers and times."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.cli import streams
from pipeline.spec.words import count, duration, plural, printable
from storage.redaction import redact_known, redact_known_values

__all__ = ["count", "duration", "plural", "printable"]
"""For the commands, with the rest of what they say."""

VERSION = 1
"""Version of every JSON shape. It rises when a field goes, or changes its meaning; not when one is added."""


def emit_json(document: Mapping[str, Any]) -> None:
    """One JSON document, with its version, on stdout."""
    shown = redact_known_values({"version": VERSION, **document})
    text = json.dumps(shown, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    streams.write(text.encode("utf-8", "replace").decode() + "\n")


def emit(text: str) -> None:
    """One piece of text on stdout, and out of the buffer, so that a closed pipe is noticed here. Secrets are hidden.

    Raises ``BrokenPipeError`` when nobody reads on, and :class:`~pipeline.cli.streams.OutputError` for a full disk.
    """
    streams.write(redact_known(text) + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> str:
    """Aligned columns without lines around them; ``right`` names the columns that are aligned to the right.

    Nothing is cut off: a terminal wraps, a pipe gets every character.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = [[name.upper() for name in columns], *cells]
    widths = [max(width(line[i]) for line in lines) for i in range(len(columns))]
    numeric = [name in right for name in columns]
    return "\n".join(
        "  ".join(_pad(cell, w, r) for cell, w, r in zip(line, widths, numeric, strict=True)).rstrip() for line in lines
    )


def terminal_width() -> int | None:
    """Cells that a line of stdout may take: ``COLUMNS``, or the terminal's; ``None`` where stdout is no terminal."""
    if os.environ.get("COLUMNS", "").isdecimal() or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return None


def fitted(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    cells: int,
    *,
    shrink: Mapping[str, int],
    leave_out: Sequence[str],
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a :func:`table` that takes at most ``cells``, as far as these means allow.

    ``shrink`` names columns whose values may be cut, in that order, to the number of cells given; their ends are kept.
    Where that is not enough, the columns in ``leave_out`` go, one after the other.
    """
    named = {name: [printable(row[at]) for row in rows] for at, name in enumerate(columns)}
    natural = {name: max(width(text) for text in (name, *cells_of)) for name, cells_of in named.items()}
    least = {n: min(w, max(shrink[n], width(n))) if n in shrink else w for n, w in natural.items()}
    for name in leave_out:
        if _line(least.values()) <= cells:
            break
        del least[name]
    over = _line(natural[name] for name in least) - cells
    for name in shrink:
        if name in least and over > 0:
            cut = min(over, natural[name] - least[name])
            named[name] = [_ending(text, natural[name] - cut) for text in named[name]]
            over -= cut
    kept = [name for name in columns if name in least]
    return kept, [list(line) for line in zip(*(named[name] for name in kept), strict=True)]


def _line(widths: Iterable[int]) -> int:
    each = list(widths)
    return sum(each) + 2 * (len(each) - 1)


def _ending(text: str, cells: int) -> str:
    """The text, or as much of its end as fits behind an ellipsis."""
    if width(text) <= cells:
        return text
    while width(text) > cells - 1:
        text = text[1:]
    return f"…{text}"


def pairs(items: Iterable[tuple[str, object]]) -> str:
    """Names and values, one to a line; values that are ``None`` or empty are left out."""
    kept = [(name, printable(value)) for name, value in items if value not in (None, "", {}, ())]
    longest = max((width(name) for name, _ in kept), default=0)
    return "\n".join(f"{_pad(name, longest, False)}  {value}" for name, value in kept)


def width(text: str) -> int:
    """Cells that the text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _pad(text: str, to: int, right: bool) -> str:
    space = " " * (to - width(text))
    return space + text if right else text + space


def moment(at: float | None) -> str | None:
    """A local time to the second, with its offset from UTC."""
    return None if at is None else time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(at))


def size(n_bytes: float) -> str:
    """``512 B``, ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.1f} TiB"


@contextmanager
def only_ours() -> Iterator[None]:
    """Keep stdout for data: while inside, whatever libraries and their child processes print to it goes to stderr.

    vLLM, for one, logs to stdout, from its children too, so this is done to the file descriptor itself.
    """
    try:
        ours = sys.stdout.fileno() == 1 and sys.stderr.fileno() == 2
    except (OSError, ValueError):  # replaced by something that is not a file, as tests do
        ours = False
    if not ours:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
