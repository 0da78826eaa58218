"""A text file's bytes, decompressed on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pyarrow as pa

from storage.objects import ObjectStore

Codec = Literal["gzip", "zstd"]


@contextmanager
def opened(store: ObjectStore, uri: str, compression: Codec | None) -> Iterator[Any]:
    """A reader (``read(n)``, also for pyarrow) over the content of ``uri``. Bad compression raises ``OSError``."""
    with store.open(uri) as opened_file:
        file: Any = opened_file
        if compression is None:
            yield file
        else:
            with pa.CompressedInputStream(file, compression) as stream:
                yield stream
