"""Which format an input file has: by the end of its name, or by its first bytes where the name says nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from pipeline.text_streams import Codec
from storage.errors import InvalidInput
from storage.objects import ObjectStore


class Kind(StrEnum):
    PARQUET = "Parquet"
    JSONL = "JSONL"
    CSV = "CSV"
    IPC = "Arrow IPC"


@dataclass(frozen=True, slots=True)
class Format:
    """``compression`` is pyarrow's name of the codec around the whole file, or ``None``."""

    kind: Kind
    compression: Codec | None = None


_KINDS = {
    ".parquet": Kind.PARQUET,
    ".pq": Kind.PARQUET,
    ".jsonl": Kind.JSONL,
    ".ndjson": Kind.JSONL,
    ".json": Kind.JSONL,
    ".csv": Kind.CSV,
    ".arrow": Kind.IPC,
    ".feather": Kind.IPC,
    ".ipc": Kind.IPC,
}
_CODECS: dict[str, Codec] = {".gz": "gzip", ".zst": "zstd"}
_TABLES = (
    ".tsv", ".orc", ".avro", ".xls", ".xlsx", ".ods", ".h5", ".npy", ".npz", ".db", ".sqlite", ".xml", ".yaml", ".yml",
    ".pkl", ".tar", ".zip", ".gz", ".zst", ".bz2", ".xz", ".lz4", ".sz", ".snappy", ".br", ".tmp", ".part",
)  # fmt: skip
"""What may well hold rows, or be a file on its way: passing over one would lose them."""
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_-]{0,9}$")
_MAGIC = {b"PAR1": Kind.PARQUET, b"PARE": Kind.PARQUET, b"ARRO": Kind.IPC}


def format_of(store: ObjectStore, uri: str) -> Format:
    """The file's format. Raises :class:`InvalidInput` when neither name nor content tells."""
    name = uri.rsplit("/", 1)[-1].lower()
    for suffix, codec in _CODECS.items():
        if name.endswith(suffix):
            kind = _by_suffix(name.removesuffix(suffix))
            if kind in (Kind.JSONL, Kind.CSV):
                return Format(kind, codec)
            raise InvalidInput(f"cannot read {uri}: only JSONL and CSV are read compressed as a whole", field="input")
    known = _by_suffix(name)
    known = known or _by_content(store, uri)
    if known is None:
        raise InvalidInput(
            f"cannot tell the format of {uri}: name it {', '.join(_KINDS)} (JSONL and CSV also with .gz or .zst)",
            field="input",
        )
    return Format(known)


def is_beside_the_point(store: ObjectStore, uri: str) -> bool:
    """Whether a file in a folder of data is evidently none itself (``readme.txt``): no format of ours, none of others.

    Names without a suffix are left to :func:`format_of`: warehouses write data under such.
    """
    name = uri.rsplit("/", 1)[-1].lower()
    if _SUFFIX.search(name) is None or _by_suffix(name) is not None or name.endswith(_TABLES):
        return False
    return _by_content(store, uri) is None


def _by_content(store: ObjectStore, uri: str) -> Kind | None:
    with store.open(uri) as file:
        return _MAGIC.get(file.read(4))


def _by_suffix(name: str) -> Kind | None:
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), None)
