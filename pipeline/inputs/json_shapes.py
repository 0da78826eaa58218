"""What the values of a JSON column have in common: a shape, which every pair of values has, and its Arrow type. Pure.

A shape is a word (``null``, ``bool``, ``int``, ``float``, ``text``, ``mixed``), ``ListOf`` or ``Fields``. ``mixed`` is
what no other shape holds; its Arrow type is ``arrow.json``, JSON text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.parquet import arrow_schemas

JSON = pa.json_(pa.string())
_SCALARS: Mapping[str, pa.DataType] = {"bool": pa.bool_(), "text": pa.string(), "null": pa.string()}
EXACT = 2**53
"""Whole numbers up to this one are exact as doubles."""
_DIGITS = 400
_SPACE = " \t\r\n"

Path = tuple[str | None, ...]
"""Where a value is inside of a column: the names of objects' fields, ``None`` for a list's elements."""


@dataclass(frozen=True, slots=True)
class ListOf:
    element: Shape


@dataclass(frozen=True, slots=True)
class Fields:
    by_name: Mapping[str, Shape]


Shape = str | ListOf | Fields


def merged(first: Shape, second: Shape) -> Shape:
    """The narrowest shape that holds the values of both."""
    if first == second or second == "null":
        return first
    if first == "null":
        return second
    if isinstance(first, str) and isinstance(second, str) and {first, second} == {"int", "float"}:
        return "float"
    if isinstance(first, ListOf) and isinstance(second, ListOf):
        return ListOf(merged(first.element, second.element))
    if isinstance(first, Fields) and isinstance(second, Fields):
        both = dict(first.by_name)
        for name, shape in second.by_name.items():
            both[name] = merged(both[name], shape) if name in both else shape
        return Fields(both)
    return "mixed"


@dataclass(slots=True)
class Seen:
    """What the values of one column were so far. ``whole``: least and greatest whole number at each place."""

    shape: Shape = "null"
    whole: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def add(self, value: Any) -> None:
        """A value as Python's JSON parser gives it."""
        if self.shape != "mixed":
            self.shape = merged(self.shape, self._shape_of(value, ()))

    def add_column(self, column: pa.Array[Any]) -> None:
        """Values as Arrow's JSON parser gives them."""
        if self.shape != "mixed":
            self.shape = merged(self.shape, self._shape_of_array(column, ()))

    def type(self) -> pa.DataType:
        """A type that gives every value back, ``pa.null()`` where there was none."""
        if self.shape == "null":
            return pa.null()
        kind = self._type_of(self.shape, ())
        if kind is None or 1 + arrow_schemas.levels(kind) > arrow_schemas.MOST_LEVELS:
            return JSON
        return kind

    def _shape_of(self, value: Any, path: Path) -> Shape:
        if value is None:
            return "null"
        if isinstance(value, bool):
            return "bool"
        if isinstance(value, int):
            self._note(path, value, value)
            return "int"
        if isinstance(value, float):
            return "mixed" if math.isinf(value) else "float"
        if isinstance(value, str):
            return "text"
        if isinstance(value, list):
            element: Shape = "null"
            for item in value:
                element = merged(element, self._shape_of(item, (*path, None)))
            return ListOf(element)
        return Fields({name: self._shape_of(item, (*path, name)) for name, item in value.items()})

    def _shape_of_array(self, column: Any, path: Path) -> Shape:
        kind = column.type
        if pa.types.is_null(kind):
            return "null"
        if pa.types.is_boolean(kind):
            return "bool"
        if pa.types.is_integer(kind):
            ends: Any = pc.min_max(column).as_py()
            if ends["min"] is not None:
                self._note(path, ends["min"], ends["max"])
            return "int"
        if pa.types.is_floating(kind):
            return "float"
        if isinstance(kind, pa.ListType):
            return ListOf(self._shape_of_array(column.flatten(), (*path, None)))
        if isinstance(kind, pa.StructType):
            names = [kind.field(at).name for at in range(kind.num_fields)]
            return Fields(
                {name: self._shape_of_array(column.field(at), (*path, name)) for at, name in enumerate(names)}
            )
        return "text"  # or what Arrow takes for a time, because it looks like one

    def _note(self, path: Path, low: int, high: int) -> None:
        known = self.whole.get(path)
        self.whole[path] = (low, high) if known is None else (min(known[0], low), max(known[1], high))

    def _type_of(self, shape: Shape, path: Path) -> pa.DataType | None:
        """``None`` where no type gives the values back."""
        if isinstance(shape, ListOf):
            element = self._type_of(shape.element, (*path, None))
            return None if element is None else pa.list_(element)
        if isinstance(shape, Fields):
            found = {name: self._type_of(inner, (*path, name)) for name, inner in shape.by_name.items()}
            fields = [pa.field(name, kind) for name, kind in found.items() if kind is not None]
            # Parquet has no objects without fields.
            return pa.struct(fields) if fields and len(fields) == len(found) else None
        low, high = self.whole.get(path, (0, 0))
        if shape == "int":
            if low >= -(2**63) and high < 2**63:
                return pa.int64()
            return pa.uint64() if low >= 0 and high < 2**64 else None
        if shape == "float":
            return pa.float64() if max(-low, high) <= EXACT else None
        return _SCALARS.get(shape)


def _whole(digits: str) -> int | float:
    # Python takes very long for very many digits, and then refuses.
    return int(digits) if len(digits) < _DIGITS else math.inf


_VALUE = json.JSONDecoder(strict=False, parse_int=_whole).raw_decode


def members(line: str, wants: Callable[[str], bool]) -> dict[str, tuple[Any, str]]:
    """The members of a JSON object: name → (value, its text as it stands).

    Raises ``ValueError`` with the reason: not JSON, no object, or a wanted name that comes twice.
    """
    found: dict[str, tuple[Any, str]] = {}
    at = _skipped(line, 0)
    if line[at : at + 1] != "{":
        _VALUE(line, at)
        raise ValueError("not a JSON object; write one JSON object per line")
    at = _skipped(line, at + 1)
    if line[at : at + 1] == "}":
        _end(line, at + 1)
        return found
    while True:
        if line[at : at + 1] != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", line, at)
        name, at = scanstring(line, at + 1, False)
        at = _skipped(line, at)
        if line[at : at + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", line, at)
        begin = _skipped(line, at + 1)
        value, at = _VALUE(line, begin)
        if name in found and wants(name):
            raise ValueError(f"{name!r} was specified twice")
        found[name] = value, line[begin:at]
        at = _skipped(line, at)
        after, at = line[at : at + 1], at + 1
        if after == "}":
            _end(line, at)
            return found
        if after != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", line, at - 1)
        at = _skipped(line, at)


def _skipped(line: str, at: int) -> int:
    while line[at : at + 1] in _SPACE and at < len(line):
        at += 1
    return at


def _end(line: str, at: int) -> None:
    at = _skipped(line, at)
    if at < len(line):
        raise json.JSONDecodeError("Extra data", line, at)
