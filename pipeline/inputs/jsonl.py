"""JSON Lines to tables: one pass over all files to learn the types, one to read them. Strings stay strings.

A column whose values have no type in common is carried as JSON text (``arrow.json``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from pipeline.inputs import compressed, json_array
from pipeline.inputs.compressed import Codec
from pipeline.inputs.json_shapes import EXACT, JSON, Seen, members
from pipeline.spec.json_text import MAX_DEPTH, TooDeep
from pipeline.spec.text_options import TextOptions
from storage.errors import InvalidInput
from storage.objects.store import ObjectStore
from storage.parquet.batches import readable

BLOCK_BYTES = 4 * 2**20
LINE_BYTES = 256 * 2**20
"""A longer line is refused: it would have to be held in memory several times over."""
_NO_BRACKETS = bytes(sorted(set(range(256)) - set(b'[]{}"\n')))
_STRING = re.compile(rb'"[^"\n]*"?')
_OPENING, _CLOSING = np.frombuffer(b"[{", np.uint8), np.frombuffer(b"]}", np.uint8)
_BARE_NULL = re.compile(rb"null[ \t\r]*(?:\n|\Z)")
"""At the end of a line that is no object."""
_FIRST_NULL = re.compile(rb"\xef?\xbb?\xbf?[ \t\r\n]*null")
"""At the beginning of a block, where pyarrow skips white space and any bytes of a byte order mark. Whatever comes after
it, and of no other first value, pyarrow crashes."""
_ARROWS_ROW = re.compile(r"^JSON parse error: |\.? in row \d+$")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u([dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)


class JsonlReader:
    """The JSONL files of one input: ``survey`` all of them, then read their ``tables``."""

    def __init__(self, store: ObjectStore, options: TextOptions) -> None:
        self._store, self._options = store, options
        self._seen: dict[str, Seen] = {}

    def survey(self, uri: str, compression: Codec | None) -> None:
        """Take a file's values into account. Raises :class:`InvalidInput` with the line number and the reason."""
        rows = False
        for first, block in self._blocks(uri, compression):
            _refuse_depth(uri, first, block)
            self._survey(uri, first, block)
            rows = True
        if rows and not self._seen:
            raise InvalidInput(f"{uri} has rows and no columns: every line is an empty object", field="input")

    @property
    def schema(self) -> pa.Schema:
        """All columns of all files, also those that are not read."""
        kept = self._options.as_json
        return pa.schema([pa.field(n, JSON if n in kept else seen.type()) for n, seen in self._seen.items()])

    def tables(self, uri: str, compression: Codec | None) -> Iterator[pa.Table]:
        """The file's rows in blocks of about ``BLOCK_BYTES``; one empty table when there is none."""
        everything = self.schema
        # At least one column, so that the rows can be counted.
        wanted = [item for item in everything if self._options.wants(item.name)] or list(everything)[:1]
        schema = pa.schema(wanted)
        yield schema.empty_table()
        for first, block in self._blocks(uri, compression):
            yield self._table(uri, first, block, schema)

    def _survey(self, uri: str, first: int, block: bytes) -> None:
        try:
            table = _parse(_without_halves(block), None)
            if table.num_rows == _full(block) and not any(
                _may_be_rounded(chunk) for column in table.columns for chunk in column.chunks
            ):
                for item, column in zip(table.schema, table.columns, strict=True):
                    seen = self._seen.setdefault(item.name, Seen())
                    if self._options.wants(item.name):
                        for chunk in column.chunks:
                            seen.add_column(chunk)
                return
        except UnicodeDecodeError as error:
            raise _bad_name(uri, error) from error
        except pa.ArrowInvalid:
            pass  # values that vary, or a line at fault: looked at one by one
        for name, value in (item for line in self._objects(uri, first, block) for item in line.items()):
            seen = self._seen.setdefault(name, Seen())
            if self._options.wants(name):
                seen.add(value[0])

    def _table(self, uri: str, first: int, block: bytes, schema: pa.Schema) -> pa.Table:
        typed = pa.schema([item for item in schema if item.type != JSON])
        columns: dict[str, Any] = {}
        if typed.names:
            columns = dict(zip(typed.names, self._typed(uri, first, block, typed).columns, strict=True))
        if len(typed) < len(schema):
            texts: dict[str, list[bytes | None]] = {item.name: [] for item in schema if item.type == JSON}
            for line in self._objects(uri, first, block):
                for name, found in texts.items():
                    value, text = line.get(name, (None, "null"))
                    # What stands in the file, to the byte, whether that is UTF-8 or not.
                    found.append(None if value is None else text.encode("utf-8", "surrogateescape"))
            for name, found in texts.items():
                columns[name] = pa.ExtensionArray.from_storage(JSON, pa.array(found, pa.binary()).view(pa.string()))
        return pa.Table.from_arrays([columns[item.name] for item in schema], schema=schema)

    def _typed(self, uri: str, first: int, block: bytes, schema: pa.Schema) -> pa.Table:
        n_rows = _full(block)
        try:
            table = _parse(_without_halves(block), schema)
            if table.num_rows == n_rows:
                return table
        except pa.ArrowInvalid:
            pass  # a line at fault, or a column that is no part of the schema: Arrow looks at that, too
        lines = []
        for line in self._objects(uri, first, block):
            texts = (f"{json.dumps(name)}:{line[name][1]}" for name in schema.names if name in line)
            lines.append(("{" + ",".join(texts) + "}\n").encode("utf-8", "surrogateescape"))
        try:
            return _parse(_without_halves(b"".join(lines)), schema)
        except pa.ArrowInvalid as error:
            raise _fault(uri, first, block, lines, schema, error) from error

    def _objects(self, uri: str, first: int, block: bytes) -> Iterator[dict[str, tuple[Any, str]]]:
        """The members of each line's object. Raises :class:`InvalidInput` for the first line that is none."""
        for at, line in enumerate(block.split(b"\n")):
            if not line.strip():
                continue
            try:
                found = members(line.decode("utf-8", "surrogateescape"), self._options.wants)
                for name in found:
                    name.encode()
            except json.JSONDecodeError as error:
                hint = "; write one JSON object per line" if line.lstrip()[:1] in (b"[", b"{") else ""
                reason = f"{error.msg} at character {error.pos + 1}{hint}"
            except UnicodeEncodeError as error:
                shown = error.object.encode("utf-8", "surrogatepass")
                reason = f"the name {shown!r} is not UTF-8; mend it, or give the file's encoding (--encoding)"
            except ValueError as error:
                reason = str(error)
            except RecursionError:
                reason = "nested too deeply"
            else:
                yield found
                continue
            raise InvalidInput(f"{uri}, line {first + at}: {reason}", field="input")

    def _blocks(self, uri: str, compression: Codec | None) -> Iterator[tuple[int, bytes]]:
        """Whole lines: (number of the first, bytes). Blocks without anything but white space are left out."""
        line, rest = 1, b""
        with compressed.opened(self._store, uri, compression, self._options.encoding) as opened:
            with readable(uri, InvalidInput, "it cannot be decompressed"):
                stream = json_array.as_lines(opened, uri, LINE_BYTES)
            while True:
                with readable(uri, InvalidInput, "it cannot be decompressed"):
                    chunk = bytes(stream.read(BLOCK_BYTES))
                data = rest + chunk
                cut = data.rfind(b"\n") + 1 if chunk else len(data)
                if data[:cut].strip():
                    yield line, data[:cut]
                line += data.count(b"\n", 0, cut)
                rest = data[cut:]
                if len(rest) > LINE_BYTES:
                    raise InvalidInput(f"{uri}, line {line}: longer than {LINE_BYTES // 2**20} MiB", field="input")
                if not chunk:
                    return


def _bad_name(uri: str, error: UnicodeDecodeError) -> InvalidInput:
    return InvalidInput(
        f"{uri}: a name in it is not UTF-8 ({error.object[:80]!r}); give the file's encoding (--encoding latin-1, for "
        "example)",
        field="encoding",
    )


def _without_halves(block: bytes) -> bytes:
    """Half of a surrogate pair, which is no character, as the bytes that are not UTF-8: so it is its row's error."""
    if _SURROGATE.search(block) is None:
        return block

    def replaced(match: re.Match[bytes]) -> bytes:
        half = match[1]
        return match[0] if half is None else chr(int(half, 16)).encode("utf-8", "surrogatepass")

    return _ESCAPE.sub(replaced, block)


def _full(block: bytes) -> int:
    return sum(1 for line in block.split(b"\n") if line.strip())


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
    if _FIRST_NULL.match(data) or _BARE_NULL.search(data):
        raise pa.ArrowInvalid("a line is null")
    unexpected: Literal["infer", "ignore"] = "infer" if schema is None else "ignore"
    source: Any = pa.BufferReader(data)
    return pj.read_json(
        source,
        read_options=pj.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected),
    )


def _may_be_rounded(column: Any) -> bool:
    """Whether a whole number that a double does not hold exactly may have become one of the column's doubles."""
    kind = column.type
    if isinstance(kind, pa.StructType):
        return any(_may_be_rounded(column.field(at)) for at in range(kind.num_fields))
    if isinstance(kind, pa.ListType):
        return _may_be_rounded(column.flatten())
    if not pa.types.is_floating(kind):
        return False
    largest = pc.max(pc.abs(column)).as_py()
    return largest is not None and not largest < EXACT


def _fault(
    uri: str, first: int, block: bytes, lines: list[bytes], schema: pa.Schema, problem: Exception
) -> InvalidInput:
    """Which line of ``block`` Arrow refuses, and why; ``lines`` are its objects."""
    low, high = 0, len(lines)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            _parse(_without_halves(b"".join(lines[low:middle])), schema)
            low = middle
        except pa.ArrowInvalid as error:
            high, problem = middle, error
    reason = _ARROWS_ROW.sub("", str(problem))
    at = [at for at, line in enumerate(block.split(b"\n")) if line.strip()][low]
    return InvalidInput(f"{uri}, line {first + at}: {reason}", field="input")
