"""Parquet columns that were written from dictionaries whose text is not UTF-8: pyarrow refuses to build those again.

Read as plain text such columns give all their rows, and what is not UTF-8 is the problem of the rows that hold it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_REFUSAL = "Invalid UTF8"
_KEY = b"ARROW:schema"


def is_refusal(error: pa.ArrowInvalid) -> bool:
    """Whether pyarrow says that the text of a dictionary is not UTF-8."""
    return _REFUSAL in str(error)


def healed(
    batches: Iterator[pa.RecordBatch], again: Callable[[], Iterator[pa.RecordBatch]]
) -> Iterator[pa.RecordBatch]:
    """``batches``, and from where pyarrow refuses a dictionary on those of ``again``, which begin from the start."""
    count = 0
    try:
        for batch in batches:
            yield batch
            count += 1
    except pa.ArrowInvalid as error:
        if not is_refusal(error):
            raise
    else:
        return
    yield from islice(again(), count, None)


def plain_batches(
    file: Any, footer: pq.FileMetaData, schema: pa.Schema, columns: Sequence[str], number: int, rows: int
) -> Iterator[pa.RecordBatch]:
    """Row group ``number``, ``rows`` at a time, with text in place of dictionaries of text."""
    folded = [name for name in columns if _has_dictionary(schema.field(name).type)]
    buffer = io.BytesIO()
    footer.write_metadata_file(buffer)
    # Without the Arrow schema that the writer noted, the columns are what Parquet says: text.
    plain = pq.read_metadata(io.BytesIO(buffer.getvalue().replace(_KEY, _KEY.lower())))
    readers = [
        pq.ParquetFile(file, metadata=metadata, pre_buffer=False, page_checksum_verification=True).iter_batches(
            rows, row_groups=[number], columns=names, use_threads=False
        )
        for metadata, names in ((plain, folded), (footer, [name for name in columns if name not in folded]))
        if names
    ]
    for parts in zip(*readers, strict=True):
        found = {name: part.column(name) for part in parts for name in part.schema.names}
        yield pa.RecordBatch.from_arrays([found[name] for name in columns], names=list(columns))


def _has_dictionary(kind: Any) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _has_dictionary(kind.storage_type)
    if isinstance(kind, pa.DictionaryType):
        return True
    return any(_has_dictionary(kind.field(at).type) for at in range(kind.num_fields))
