"""A data frame of any library as a Parquet file: written in bounded memory, and the same bytes for the same rows.

However a frame is cut into batches, its rows are gathered into the same groups here, and dictionaries are made anew, so
that the file's hash tells frames apart by their content.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.errors import InvalidInput, RowmillError
from storage.objects.store import ObjectStore, Written
from storage.parquet.arrow_schemas import has_parquet_type

GROUP_ROWS = 16_384
GROUP_BYTES = 32 * 2**20
"""A row group ends with the rows at which either is reached."""
_STEP_ROWS = 256
"""Rows that are added to a row group at a time."""

_ACCEPTED = (
    "a pandas or Polars DataFrame, a DuckDB relation, a pyarrow Table, RecordBatch, RecordBatchReader or Dataset"
)


def reader_of(data: object) -> pa.RecordBatchReader:
    """The rows of ``data`` as a stream of batches, not read yet.

    Raises :class:`InvalidInput` for what is no table, and for one that cannot be a job's input: without columns, with a
    name twice, or with types that Parquet does not have.
    """
    with _explained():
        reader = _stream(data)
    names = reader.schema.names
    if not names:
        raise InvalidInput("it has no columns", field="data")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InvalidInput(
            f"the name {twice[0]!r} belongs to {names.count(twice[0])} columns; each needs its own", field="data"
        )
    for field in reader.schema:
        if not has_parquet_type(plain(field).type):
            raise InvalidInput(
                f"column {field.name!r} is {field.type}, which Parquet does not have; cast it", field="data"
            )
    return reader


def _stream(data: object) -> pa.RecordBatchReader:
    scanner = getattr(data, "scanner", None)
    if isinstance(data, type):
        raise InvalidInput(f"it is the class {data.__name__}, and not one of its tables", field="data")
    if isinstance(data, pa.Array | pa.ChunkedArray) or hasattr(data, "to_frame"):
        raise InvalidInput(
            f"it is one column, a {type(data).__name__}, without a table around it; make one: to_frame(), or "
            "pyarrow.table({'text': column})",
            field="data",
        )
    if hasattr(data, "__arrow_c_stream__"):
        found = pa.RecordBatchReader.from_stream(cast(Any, data))
    elif hasattr(data, "__arrow_c_array__"):
        found = pa.Table.from_batches([pa.record_batch(cast(Any, data))]).to_reader()
    elif callable(scanner):  # a pyarrow.dataset
        found = scanner().to_reader()
    elif hasattr(data, "to_reader") and hasattr(data, "projected_schema"):  # its scanner
        found = cast(Any, data).to_reader()
    elif hasattr(data, "collect"):
        raise InvalidInput(f"a {type(data).__name__} holds no rows yet: collect() it", field="data")
    else:
        raise InvalidInput(f"it is a {type(data).__name__}; it takes {_ACCEPTED}", field="data")
    return found


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What the library of a frame raises, in our words."""
    try:
        yield
    except RowmillError:
        raise
    except Exception as error:
        # Arrow puts the traceback of a generator below the first line.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InvalidInput(f"its rows cannot be read: {reason}", field="data") from error


def plain(field: pa.Field[Any]) -> pa.Field[Any]:
    """The field in the file. Views are a memory layout only: a view of text is stored as text."""
    return field.with_type(_plain_type(field.type))


def _plain_type(kind: Any) -> Any:
    if kind == pa.string_view():
        return pa.large_string()
    if kind == pa.binary_view():
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _plain_type(kind.value_type), kind.ordered)
    if pa.types.is_list_view(kind):
        return pa.list_(plain(kind.value_field))
    if pa.types.is_large_list_view(kind):
        return pa.large_list(plain(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_field), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(plain(kind.value_field))
    if pa.types.is_map(kind):
        return pa.map_(plain(kind.key_field), plain(kind.item_field))
    if pa.types.is_list(kind):
        return pa.list_(plain(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([plain(kind.field(at)) for at in range(kind.num_fields)])
    return kind


def write(store: ObjectStore, uri: str, reader: pa.RecordBatchReader, *, once: bool = False) -> Written:
    """Write all rows to ``uri``. Memory: a batch of the reader, and a row group.

    ``once``: the reader was handed in by the caller, who may have read it already. Warns when it gives no batch.
    """
    schema = pa.schema([plain(field) for field in reader.schema], metadata=cast(Any, reader.schema.metadata))
    with (
        store.create(uri) as file,
        pq.ParquetWriter(cast(IO[bytes], file), schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for group in _groups(_steps(reader, once=once), schema):
            writer.write_table(group, row_group_size=max(1, group.num_rows))
    return file.written


def _steps(reader: pa.RecordBatchReader, *, once: bool) -> Iterator[pa.Table]:
    """All rows, ``_STEP_ROWS`` at a time."""
    waiting: deque[pa.RecordBatch] = deque()
    rows, read = 0, False
    while True:
        with _explained():
            batch = next(reader, None)
        if batch is None:
            break
        read = True
        waiting.append(batch)
        rows += batch.num_rows
        while rows >= _STEP_ROWS:
            yield _taken(waiting, _STEP_ROWS)
            rows -= _STEP_ROWS
    if rows:
        yield _taken(waiting, rows)
    if once and not read:
        # Arrow does not tell a reader at its end from one without rows.
        warnings.warn(
            "data: the RecordBatchReader gave no rows; it can be read only once, so if it has been, hand in a new one",
            stacklevel=2,
        )


def _taken(waiting: deque[pa.RecordBatch], rows: int) -> pa.Table:
    taken = []
    while rows:
        batch = waiting.popleft()
        if batch.num_rows > rows:
            waiting.appendleft(batch.slice(rows))
            batch = batch.slice(0, rows)
        taken.append(batch)
        rows -= batch.num_rows
    return pa.Table.from_batches(taken)


def _groups(steps: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    gathered: list[pa.Table] = []
    rows = n_bytes = 0
    for step in steps:
        gathered.append(step)
        rows += step.num_rows
        n_bytes += step.nbytes
        if rows >= GROUP_ROWS or n_bytes >= GROUP_BYTES:
            yield _canonical(pa.concat_tables(gathered), schema)
            gathered, rows, n_bytes = [], 0, 0
    if gathered:
        yield _canonical(pa.concat_tables(gathered), schema)


def _canonical(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The same values in the same arrays, wherever the source's batches began and ended."""
    columns = [
        _encoded(column, field.type) if pa.types.is_dictionary(field.type) else column.combine_chunks().cast(field.type)
        for column, field in zip(table.columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(cast(Any, columns), schema=schema)


def _encoded(column: Any, kind: Any) -> Any:
    """A dictionary column with a dictionary of its own: the values that occur, by their first row."""
    decoded = [chunk.dictionary.cast(kind.value_type).take(chunk.indices) for chunk in column.chunks]
    values: Any = pa.chunked_array(decoded, type=kind.value_type).combine_chunks()
    fresh: Any = pc.dictionary_encode(values)
    return pa.DictionaryArray.from_arrays(
        fresh.indices.cast(kind.index_type), fresh.dictionary, ordered=bool(kind.ordered)
    )
