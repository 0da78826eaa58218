"""Where an ONNX graph keeps the weights that are not in its file.

A walk over the protobuf wire format (https://protobuf.dev/programming-guides/encoding) along the fields of
``onnx.proto`` that lead to tensors, skipping their content: the base install has no ``onnx``, and a digest must not
depend on what is installed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_LEADS_TO: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Message → field number → kind of the message in that field."""


def locations(graph: Path) -> tuple[str, ...]:
    """The external data files that the graph names, relative to its directory, sorted, each once.

    Raises ``OSError``, and ``ValueError`` for a file that is not protobuf. A file that did not change is walked once
    in a process: 110 million parameters in some thousand nodes take 0.1 s to 0.3 s.
    """
    stat = graph.stat()
    return _locations(graph, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@lru_cache(maxsize=256)
def _locations(graph: Path, stamp: tuple[int, ...]) -> tuple[str, ...]:
    with graph.open("rb") as file:
        if stamp[0] == 0:
            raise ValueError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return tuple(sorted(_walk(data)))


def _walk(data: mmap.mmap) -> set[str]:
    found: set[str] = set()
    pending = [("model", 0, len(data))]
    while pending:
        kind, start, end = pending.pop()
        if kind == "entry":
            entry = {number: data[low:high] for number, low, high in _fields(data, start, end)}
            if entry.get(1) == b"location":
                found.add(entry.get(2, b"").decode("utf-8"))
            continue
        leads_to = _LEADS_TO[kind]
        for number, low, high in _fields(data, start, end):
            if number in leads_to:
                pending.append((leads_to[number], low, high))
    return found


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of every length-delimited field between ``at`` and ``end``."""
    while at < end:
        tag, at = _varint(data, at, end)
        match tag & 7:
            case 0:
                _, at = _varint(data, at, end)
            case 1:
                at += 8
            case 2:
                size, at = _varint(data, at, end)
                if at + size > end:
                    raise ValueError(f"a field at byte {at} is cut off")
                yield tag >> 3, at, at + size
                at += size
            case 5:
                at += 4
            case wire:
                raise ValueError(f"wire type {wire} at byte {at}")
    if at != end:
        raise ValueError(f"a field ends past byte {end}")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"a number at byte {at} is cut off")
