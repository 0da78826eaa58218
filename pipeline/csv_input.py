"""CSV to tables: one pass over all rows to learn the types, one to read them. The first row names the columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv

from pipeline import text_streams
from pipeline.text_streams import Codec
from storage.errors import InvalidInput
from storage.objects import ObjectStore
from storage.parquet_batches import readable

BLOCK_BYTES = 16 * 2**20
"""Also the longest row that can be read."""
_LADDER: Sequence[pa.DataType] = (
    pa.int64(),
    pa.bool_(),
    pa.date32(),
    pa.timestamp("s"),
    pa.timestamp("us"),
    pa.float64(),
)
"""The first type that every value of a column has is the column's; text when there is none. Narrow before wide."""
_LEADING_ZERO = r"^[+-]?0[0-9]"
_NOT_A_NUMBER = {pa.int64(): _LEADING_ZERO, pa.float64(): rf"{_LEADING_ZERO}|^[+-]?[0-9]{{16,}}$"}
"""What would be read as a number and not come back as it was written."""


def tables(store: ObjectStore, uri: str, compression: Codec | None) -> Iterator[pa.Table]:
    """The file's rows in blocks; one empty table when there is none. Quoted values may span lines.

    Empty values, ``NA``, ``null`` and the like are null in all but text columns, where they are what they say. Raises
    :class:`InvalidInput` with the line number and the reason.
    """
    names = _header(store, uri, compression)
    schema = _inferred(store, uri, compression, names)
    yield schema.empty_table()
    for batch in _batches(store, uri, compression, schema, nulls=False):
        yield pa.Table.from_batches([batch])


def _header(store: ObjectStore, uri: str, compression: Codec | None) -> list[str]:
    with text_streams.opened(store, uri, compression) as stream, readable(uri, InvalidInput, "it is not readable CSV"):
        try:
            names = next((row for row in csv.reader(_text(stream)) if row), None)
        except csv.Error as error:
            raise InvalidInput(f"{uri}, line 1: {error}", field="input") from error
        if names is None:
            raise InvalidInput(f"{uri} is empty: the first line must name the columns", field="input")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidInput(f"{uri}, line 1: two columns are named {twice[0]!r}", field="input")
    return names


def _inferred(store: ObjectStore, uri: str, compression: Codec | None, names: list[str]) -> pa.Schema:
    open_types = {name: list(_LADDER) for name in names}
    empty = dict.fromkeys(names, True)
    text = pa.schema([pa.field(name, pa.string()) for name in names])
    for batch in _batches(store, uri, compression, text, nulls=True):
        for name, column in zip(names, batch.columns, strict=True):
            if column.null_count < len(column):
                empty[name] = False
                open_types[name] = [kind for kind in open_types[name] if _casts(column, kind)]
    kinds = [pa.null() if empty[name] else (*open_types[name], pa.string())[0] for name in names]
    return pa.schema([pa.field(name, kind) for name, kind in zip(names, kinds, strict=True)])


def _casts(column: pa.Array[Any], kind: pa.DataType) -> bool:
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        # Postcodes and account numbers are no numbers: 007 would become 7, and twenty digits would be rounded.
        lossy = pc.match_substring_regex(column.cast(pa.binary()), _NOT_A_NUMBER[kind])
        if pc.any(lossy).as_py():
            return False
    try:
        column.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _batches(
    store: ObjectStore, uri: str, compression: Codec | None, schema: pa.Schema, *, nulls: bool
) -> Iterator[pa.RecordBatch]:
    refused: list[Any] = []

    def refuse(row: Any) -> Literal["skip"]:
        refused.append(row)
        return "skip"

    with text_streams.opened(store, uri, compression) as stream:
        reader: Any = None
        while True:
            with readable(uri, InvalidInput, "it is not readable CSV"):
                if reader is None:
                    reader = pv.open_csv(
                        stream,
                        read_options=pv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
                        parse_options=pv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse),
                        convert_options=pv.ConvertOptions(
                            column_types=schema, strings_can_be_null=nulls, check_utf8=False
                        ),
                    )
                batch = next(reader, None)
            if refused:
                raise _ragged(store, uri, compression, refused[0])
            if batch is None:
                return
            yield batch


def _ragged(store: ObjectStore, uri: str, compression: Codec | None, row: Any) -> InvalidInput:
    """pyarrow counts rows; people count lines, and a quoted value may span several."""
    where = f"row {row.number}"
    with text_streams.opened(store, uri, compression) as stream:
        reader = csv.reader(_text(stream))
        before = 0
        try:
            for values in reader:
                if values and len(values) != row.expected_columns:
                    where = f"line {before + 1}"
                    break
                before = reader.line_num
        except csv.Error:
            pass  # longer than the csv module's limit: the row number must do
    return InvalidInput(
        f"{uri}, {where}: {row.actual_columns} values, and the first line names {row.expected_columns} columns",
        field="input",
    )


def _text(stream: Any) -> io.TextIOWrapper[Any]:
    return io.TextIOWrapper(io.BufferedReader(_Unclosable(stream)), encoding="utf-8-sig", errors="replace", newline="")


class _Unclosable(io.RawIOBase):
    """Lets a text wrapper read a stream that somebody else closes."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
