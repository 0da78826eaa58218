"""Whether the metadata of a Parquet file's column chunks can be looked at: a bad one would end the process.

pyarrow cannot raise an error for the metadata of a column chunk: asked for a chunk that is encrypted, or that lacks its
metadata, it aborts (C++ ``terminate``). A reader of the chunk looks at the same metadata, and does raise.
"""

from __future__ import annotations

import io
import os
from functools import cache
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

_ENCRYPTED = b"PARE"


def is_safe(footer: pq.FileMetaData) -> bool:
    """Whether the metadata of every column chunk can be looked at. Reads nothing of the file."""
    return _complaints(footer) <= _no_data()


def is_encrypted(file: IO[bytes]) -> bool:
    """Whether the footer itself of an open file is encrypted."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - len(_ENCRYPTED)))
    return file.read() == _ENCRYPTED


def _complaints(footer: pq.FileMetaData) -> set[str]:
    """What a reader says of the column chunks in a file that has this footer, and no data."""
    reader = pq.ParquetFile(pa.BufferReader(b""), metadata=footer)
    found = set()
    for index in range(footer.num_columns):
        path = footer.schema.column(index).path
        for number in range(footer.num_row_groups):
            try:
                next(reader.iter_batches(batch_size=1, row_groups=[number], columns=[path], use_threads=False), None)
            except (OSError, pa.ArrowException) as error:
                found.add(str(error))
    return found


@cache
def _no_data() -> set[str]:
    """What it says of a chunk whose metadata is fine."""
    file = io.BytesIO()
    pq.write_table(pa.table({"column": [0]}), file)
    return _complaints(pq.read_metadata(file))
