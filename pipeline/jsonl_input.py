"""JSON Lines to tables: one pass over all lines to learn the types, one to read them. Strings stay strings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.json as pj

from pipeline import text_streams
from pipeline.input_schema import merged_type
from pipeline.json_text import MAX_DEPTH, TooDeep
from pipeline.text_streams import Codec
from storage.errors import InvalidInput
from storage.objects import ObjectStore
from storage.parquet_batches import readable

BLOCK_BYTES = 4 * 2**20
LINE_BYTES = 256 * 2**20
"""A longer line is refused: it would have to be held in memory several times over."""
_BOM = b"\xef\xbb\xbf"
_LONG = re.compile(rb"[0-9]{16}")
"""Whole numbers of 15 digits and fewer are exact as doubles."""
_HUGE = 10**300
_NO_BRACKETS = bytes(sorted(set(range(256)) - set(b'[]{}"\n')))
_STRING = re.compile(rb'"[^"\n]*"?')
_OPENING, _CLOSING = np.frombuffer(b"[{", np.uint8), np.frombuffer(b"]}", np.uint8)
_ARROWS_ROW = re.compile(r"^JSON parse error: |\.? in row \d+$")


def tables(store: ObjectStore, uri: str, compression: Codec | None) -> Iterator[pa.Table]:
    """The file's rows in blocks of about ``BLOCK_BYTES``; one empty table when there is none.

    Raises :class:`InvalidInput` with the line number and the reason.
    """
    schema = pa.schema([])
    rows = False
    for line, block in _blocks(store, uri, compression):
        known = schema

        def widened(data: bytes, known: pa.Schema = known) -> pa.Schema:
            return _merged(known, _inferred(data))

        _refuse_depth(uri, line, block)
        schema = _checked(uri, line, block, widened)
        rows = True
    if rows and not schema.names:
        raise InvalidInput(f"{uri} has rows and no columns: every line is an empty object", field="input")
    yield schema.empty_table()
    for line, block in _blocks(store, uri, compression):
        table = _checked(uri, line, block, lambda data: _parse(data, schema))
        _refuse_rounding(uri, line, block, schema)
        yield table


def _blocks(store: ObjectStore, uri: str, compression: Codec | None) -> Iterator[tuple[int, bytes]]:
    """Whole lines: (number of the first, bytes). Blocks without anything but white space are left out."""
    line, rest = 1, b""
    with text_streams.opened(store, uri, compression) as stream:
        while True:
            with readable(uri, InvalidInput, "it cannot be decompressed"):
                chunk = bytes(stream.read(BLOCK_BYTES))
            data = rest + chunk
            if line == 1 and data.startswith(_BOM):
                data = data.removeprefix(_BOM)
            cut = data.rfind(b"\n") + 1 if chunk else len(data)
            if data[:cut].strip():
                yield line, data[:cut]
            line += data.count(b"\n", 0, cut)
            rest = data[cut:]
            if len(rest) > LINE_BYTES:
                raise InvalidInput(f"{uri}, line {line}: longer than {LINE_BYTES // 2**20} MiB", field="input")
            if not chunk:
                return


def _refuse_depth(uri: str, first: int, block: bytes) -> None:
    """Raise :class:`InvalidInput` where values are nested too deeply: Arrow's parser would end the process."""
    if block.count(b"[") + block.count(b"{") <= MAX_DEPTH:
        return
    # Brackets alone, without those in strings: escapes go first, then all that is neither bracket nor quote.
    bare = block.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_BRACKETS).replace(b'""', b"")
    text = np.frombuffer(_STRING.sub(b"", bare), np.uint8)
    steps = np.isin(text, _OPENING).astype(np.int32) - np.isin(text, _CLOSING).astype(np.int32)
    height = np.concatenate(([0], np.cumsum(steps)))
    # Counted from the lowest point so far, so that a line with too many closing brackets hides no later one.
    deep = np.flatnonzero(height - np.minimum.accumulate(height) > MAX_DEPTH)
    if len(deep):
        line = first + int(np.count_nonzero(text[: deep[0]] == ord("\n")))
        raise InvalidInput(f"{uri}, line {line}: {TooDeep()}", field="input")


def _parse(data: bytes, schema: pa.Schema | None) -> pa.Table:
    """One block, which is never cut into several: pyarrow would take a row that spans two for an error."""
    unexpected: Literal["infer", "error"] = "infer" if schema is None else "error"
    source: Any = pa.BufferReader(data)
    return pj.read_json(
        source,
        read_options=pj.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected),
    )


def _inferred(data: bytes) -> pa.Schema:
    """What pyarrow infers, but whole numbers from 2⁶³ to 2⁶⁴ (hashes, ids) are uint64, which it takes for doubles."""
    schema = _parse(data, None).schema
    if _LONG.search(data) is None:
        return schema
    for at, item in enumerate(schema):
        if pa.types.is_floating(item.type):
            unsigned = schema.set(at, item.with_type(pa.uint64()))
            with suppress(pa.ArrowInvalid):
                _parse(data, unsigned)
                schema = unsigned
    return schema


def _refuse_rounding(uri: str, first: int, block: bytes, schema: pa.Schema) -> None:
    """Raise :class:`InvalidInput` for a whole number that its column, a double, would round."""
    doubles = [item for item in schema if _holds_doubles(item.type)]
    if not doubles or _LONG.search(block) is None:
        return
    for at, line in enumerate(block.split(b"\n")):
        if _LONG.search(line) is None:
            continue
        row = json.loads(line)
        for item in doubles:
            number = _rounded(row.get(item.name), item.type)
            if number is not None:
                raise InvalidInput(
                    f"{uri}, line {first + at}: {number} in column {item.name!r} would be rounded, for the column is a "
                    "double (it has fractions, or numbers beyond 64 bits); write such numbers as strings",
                    field="input",
                )


def _holds_doubles(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.StructType):
        return any(_holds_doubles(kind.field(at).type) for at in range(kind.num_fields))
    return _holds_doubles(kind.value_type) if isinstance(kind, pa.ListType) else pa.types.is_floating(kind)


def _rounded(value: Any, kind: pa.DataType) -> int | None:
    """The first whole number in ``value`` that a double does not hold exactly."""
    if isinstance(value, list) and isinstance(kind, pa.ListType):
        found = (_rounded(item, kind.value_type) for item in value)
    elif isinstance(value, dict) and isinstance(kind, pa.StructType):
        fields = (kind.field(at) for at in range(kind.num_fields))
        found = (_rounded(value.get(item.name), item.type) for item in fields)
    else:
        whole = isinstance(value, int) and not isinstance(value, bool) and pa.types.is_floating(kind)
        return value if whole and (abs(value) >= _HUGE or int(float(value)) != value) else None
    return next((number for number in found if number is not None), None)


def _merged(known: pa.Schema, found: pa.Schema) -> pa.Schema:
    fields: dict[str, pa.Field[Any]] = {field.name: field for field in known}
    for field in found:
        kind = _without_times(field.type)
        if field.name in fields:
            before = fields[field.name].type
            # pyarrow would make it int64; a negative number is then refused, with its line.
            unsigned = {before, kind} == {pa.int64(), pa.uint64()}
            kind = pa.uint64() if unsigned else merged_type(before, kind)
        fields[field.name] = pa.field(field.name, kind)
    return pa.schema(fields.values())


def _without_times(kind: pa.DataType) -> pa.DataType:
    """pyarrow takes strings that look like dates for timestamps; JSON has no such type, and the next may not."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if isinstance(kind, pa.ListType):
        return pa.list_(_without_times(kind.value_type))
    if isinstance(kind, pa.StructType):
        return pa.struct([pa.field(f.name, _without_times(f.type)) for f in (kind.field(i) for i in range(len(kind)))])
    return kind


def _checked(uri: str, first: int, block: bytes, use: Callable[[bytes], Any]) -> Any:
    """``use(block)``; when it fails, the error names the first line at fault."""
    lines = block.split(b"\n")
    full = [at for at, line in enumerate(lines) if line.strip()]
    try:
        result = use(block)
        rows = result.num_rows if isinstance(result, pa.Table) else None
        if rows is None or rows == len(full):
            return result
        problem: Exception = ValueError("several values on one line")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        problem = error
    for at in full:
        if (reason := _not_an_object(lines[at])) is not None:
            raise InvalidInput(f"{uri}, line {first + at}: {reason}", field="input") from problem
    # Every line is an object of its own: it is their types that do not go together. Find the first that does not fit.
    low, high = 0, len(full)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            use(b"\n".join(lines[at] for at in full[:middle]))
            low = middle
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            high, problem = middle, error
    reason = _ARROWS_ROW.sub("", str(problem))
    raise InvalidInput(f"{uri}, line {first + full[high - 1]}: {reason}", field="input") from problem


def _not_an_object(line: bytes) -> str | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        hint = "; write one JSON object per line" if line.lstrip()[:1] in (b"[", b"{") else ""
        return f"{error.msg} at character {error.pos + 1}{hint}"
    except UnicodeDecodeError:
        return None
    except RecursionError:
        return "nested too deeply"
    return None if isinstance(value, dict) else "not a JSON object; write one JSON object per line"
