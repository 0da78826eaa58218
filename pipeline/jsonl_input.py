"""JSON Lines to tables: one pass over all lines to learn the types, one to read them. Strings stay strings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.json as pj

from pipeline import text_streams
from pipeline.input_schema import merged_type
from pipeline.text_streams import Codec
from storage.errors import InvalidInput
from storage.objects import ObjectStore
from storage.parquet_batches import readable

BLOCK_BYTES = 4 * 2**20
LINE_BYTES = 256 * 2**20
"""A longer line is refused: it would have to be held in memory several times over."""
_BOM = b"\xef\xbb\xbf"
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
            return _merged(known, _parse(data, None).schema)

        schema = _checked(uri, line, block, widened)
        rows = True
    if rows and not schema.names:
        raise InvalidInput(f"{uri} has rows and no columns: every line is an empty object", field="input")
    yield schema.empty_table()
    for line, block in _blocks(store, uri, compression):
        yield _checked(uri, line, block, lambda data: _parse(data, schema))


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


def _parse(data: bytes, schema: pa.Schema | None) -> pa.Table:
    """One block, which is never cut into several: pyarrow would take a row that spans two for an error."""
    unexpected: Literal["infer", "error"] = "infer" if schema is None else "error"
    source: Any = pa.BufferReader(data)
    return pj.read_json(
        source,
        read_options=pj.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected),
    )


def _merged(known: pa.Schema, found: pa.Schema) -> pa.Schema:
    fields: dict[str, pa.Field[Any]] = {field.name: field for field in known}
    for field in found:
        kind = _without_times(field.type)
        if field.name in fields:
            kind = merged_type(fields[field.name].type, kind)
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
