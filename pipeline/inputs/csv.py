"""CSV to tables: one pass over all files to learn the types, one to read them. The first row names the columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pv

from pipeline.inputs import compressed, csv_types
from pipeline.inputs.compressed import Codec
from pipeline.spec.text_options import TextOptions
from storage.errors import InvalidInput
from storage.objects.store import ObjectStore
from storage.parquet.batches import readable

BLOCK_BYTES = 16 * 2**20
"""Also the longest row that can be read."""
_DELIMITERS = {",": "','", ";": "';'", "\t": "'\\t'", "|": "'|'"}
_TABS = re.compile(r"\.tsv(\.gz|\.zst)?$")


@dataclass(frozen=True, slots=True)
class _File:
    """``positions``: of the columns that are read; ``skipped``: rows up to the one with the names, and it."""

    uri: str
    compression: Codec | None
    names: Sequence[str]
    positions: Sequence[int]
    skipped: int


class CsvReader:
    """The CSV files of one input: ``survey`` all of them, then read their ``tables``.

    ``twice`` says which file has several columns of a name; those are not read.
    """

    def __init__(self, store: ObjectStore, options: TextOptions) -> None:
        self._store, self._options = store, options
        self._given = {name: csv_types.named(kind) for name, kind in options.csv_schema.items()}
        self._open: dict[str, list[pa.DataType]] = {}
        """The types that every value so far has; those of a column without any value are all still there."""
        self._valued: set[str] = set()
        self.twice: dict[str, str] = {}

    def survey(self, uri: str, compression: Codec | None) -> None:
        """Take a file's values into account. Raises :class:`InvalidInput` with the line number and the reason."""
        file = self._file(uri, compression)
        auto = self._options.csv_types == "auto"
        for name in file.names:
            self._open.setdefault(name, list(csv_types.CANDIDATES) if auto and name not in self._given else [])
            if file.names.count(name) > 1:
                self.twice.setdefault(name, uri)
        n_rows = 0
        for batch in self._batches(file):
            for at, column in zip(file.positions, batch.columns, strict=True):
                name = file.names[at]
                if name in self._given:
                    self._check_given(file, name, column, n_rows)
                if column.null_count == len(column):
                    continue
                self._valued.add(name)
                self._open[name] = [kind for kind in self._open[name] if csv_types.comes_back(column, kind)]
            n_rows += batch.num_rows

    def check(self) -> None:
        """After all files: raise :class:`InvalidInput` for a type that was given to a column that none of them has."""
        unknown = [name for name in self._given if name not in self._open]
        if unknown and self._open:
            there = ", ".join(self._open)
            raise InvalidInput(f"no CSV has a column {unknown[0]!r}; there are {there}", field="csv_schema")

    @property
    def schema(self) -> pa.Schema:
        """All columns of all files, also those that are not read."""
        return pa.schema([pa.field(name, self._type(name)) for name in self._open])

    def tables(self, uri: str, compression: Codec | None) -> Iterator[pa.Table]:
        """The file's rows in blocks; one empty table when there is none. Quoted values may span lines."""
        file = self._file(uri, compression)
        fields = [pa.field(file.names[at], self._type(file.names[at])) for at in file.positions]
        schema = pa.schema(fields)
        yield schema.empty_table()
        for batch in self._batches(file):
            columns = [csv_types.parsed(c, f.type) for c, f in zip(batch.columns, fields, strict=True)]
            yield pa.Table.from_arrays(columns, schema=schema)

    def _type(self, name: str) -> pa.DataType:
        if name in self._given:
            return self._given[name]
        kinds = self._open[name]
        return kinds[0] if kinds and name in self._valued else pa.string()

    def _check_given(self, file: _File, name: str, column: pa.Array[Any], before: int) -> None:
        at = csv_types.first_misfit(column, self._given[name])
        if at is not None:
            text = column[at].as_buffer().to_pybytes().decode(errors="replace")
            raise InvalidInput(
                f"{file.uri}, row {before + at + 1} (the names not counted): {text[:100]!r} in column {name!r} is no "
                f"{self._options.csv_schema[name]}; give the column another type (--csv-type {name}=string)",
                field="csv_schema",
            )

    def _file(self, uri: str, compression: Codec | None) -> _File:
        with self._stream(uri, compression) as stream:
            try:
                reader = csv.reader(_text(stream), delimiter=self._delimiter(uri))
                with readable(uri, InvalidInput, "it is not readable CSV"):
                    skipped, names = next(((at, row) for at, row in enumerate(reader, 1) if row), (0, None))
            except csv.Error as error:
                raise InvalidInput(f"{uri}, line 1: {error}", field="input") from error
        if names is None:
            raise InvalidInput(f"{uri} is empty: the first line must name the columns", field="input")
        self._refuse_names(uri, names)
        positions = [
            at for at, name in enumerate(names) if names.count(name) == 1 and self._options.wants(name)
        ]  # at least one, so that the rows can be counted
        return _File(uri, compression, names, positions or [0], skipped)

    def _refuse_names(self, uri: str, names: Sequence[str]) -> None:
        for name in names:
            if "\ufffd" in name or any("\udc80" <= c <= "\udcff" for c in name):
                shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                raise InvalidInput(
                    f"{uri}, line 1: the name {shown!r} is not UTF-8; give the file's encoding (--encoding latin-1, "
                    "for example)",
                    field="encoding",
                )
        if self._options.csv_delimiter is None and len(names) == 1:
            own = _DELIMITERS[self._delimiter(uri)]
            for other, shown in _DELIMITERS.items():
                if other in names[0]:
                    raise InvalidInput(
                        f"{uri}, line 1 has no {own} and holds {shown}: say which one separates the columns with "
                        f"csv_delimiter (--csv-delimiter {shown}; --csv-delimiter {own} if it is one column)",
                        field="csv_delimiter",
                    )

    def _delimiter(self, uri: str) -> str:
        tabs = _TABS.search(uri.lower()) is not None
        return self._options.csv_delimiter or ("\t" if tabs else ",")

    def _stream(self, uri: str, compression: Codec | None) -> Any:
        return compressed.opened(self._store, uri, compression, self._options.encoding)

    def _batches(self, file: _File) -> Iterator[pa.RecordBatch]:
        """Texts, null where a value is missing (empty and not quoted); columns are named by their positions."""
        refused: list[Any] = []

        def refuse(row: Any) -> Literal["skip"]:
            refused.append(row)
            return "skip"

        names = [str(at) for at in range(len(file.names))]
        read = [names[at] for at in file.positions]
        with self._stream(file.uri, file.compression) as stream:
            reader: Any = None
            while True:
                with readable(file.uri, InvalidInput, "it is not readable CSV"):
                    if reader is None:
                        reader = _reader(stream, names, read, file.skipped, self._delimiter(file.uri), refuse)
                    batch = next(reader, None)
                if refused:
                    raise self._ragged(file, refused[0])
                if batch is None:
                    return
                yield batch

    def _ragged(self, file: _File, row: Any) -> InvalidInput:
        """pyarrow counts rows; people count lines, and a quoted value may span several."""
        where = f"row {row.number}"
        with self._stream(file.uri, file.compression) as stream:
            reader = csv.reader(_text(stream), delimiter=self._delimiter(file.uri))
            before = 0
            with suppress(csv.Error):  # longer than the csv module's limit: the row number must do
                for values in reader:
                    if values and len(values) != row.expected_columns:
                        where = f"line {before + 1}"
                        break
                    before = reader.line_num
        return InvalidInput(
            f"{file.uri}, {where}: {row.actual_columns} values, and the first line names {row.expected_columns} "
            "columns",
            field="input",
        )


def _reader(stream: Any, names: list[str], read: list[str], skipped: int, delimiter: str, refuse: Any) -> Any:
    if not stream.peek(1):
        return iter(())
    return pv.open_csv(
        stream,
        read_options=pv.ReadOptions(
            use_threads=False, block_size=BLOCK_BYTES, column_names=names, skip_rows_after_names=skipped
        ),
        parse_options=pv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse),
        convert_options=pv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            include_columns=read,
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            check_utf8=False,
        ),
    )


def _text(stream: Any) -> io.TextIOWrapper[Any]:
    return io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
