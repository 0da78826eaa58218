"""Which format an input file has: by its first bytes, and by the end of its name where these say nothing."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum

from pipeline.inputs.compressed import Codec
from storage.errors import InvalidInput
from storage.locations import protocol
from storage.objects.store import ObjectStore


class Kind(StrEnum):
    PARQUET = "Parquet"
    JSONL = "JSONL"
    CSV = "CSV"
    IPC = "Arrow IPC"
    DELTA = "Delta Lake"
    ICEBERG = "Apache Iceberg"
    HUDI = "Apache Hudi"


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
    ".tsv": Kind.CSV,
    ".arrow": Kind.IPC,
    ".feather": Kind.IPC,
    ".ipc": Kind.IPC,
}
_CODECS: dict[str, Codec] = {".gz": "gzip", ".zst": "zstd"}
_TABLES = (
    ".orc", ".avro", ".xls", ".xlsx", ".ods", ".h5", ".npy", ".npz", ".db", ".sqlite", ".xml", ".yaml", ".yml",
    ".pkl", ".tar", ".zip", ".gz", ".zst", ".bz2", ".xz", ".lz4", ".sz", ".snappy", ".br", ".tmp", ".part",
)  # fmt: skip
"""What may well hold rows, or be a file on its way: passing over one would lose them."""
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_-]{0,9}$")
_MAGIC = {b"PAR1": Kind.PARQUET, b"PARE": Kind.PARQUET, b"ARRO": Kind.IPC, b"\xff\xff\xff\xff": Kind.IPC}
_PACKED: dict[bytes, Codec] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_OTHERS = {
    b"PK\x03\x04": "a zip archive (Excel files are such, too)",
    **{b"BZh%d1AY&SY" % level: "compressed with bzip2" for level in range(1, 10)},
    b"\xfd7zXZ\x00": "compressed with xz",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF-": "a PDF document",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file",
}
"""First bytes that no text begins with, of files that no name makes readable here."""
_ARROW = (b"ARROW1\0\0", b"\xff\xff\xff\xff")
_HEAD_BYTES = 16


def format_of(store: ObjectStore, uri: str) -> Format:
    """The file's format: what its first bytes say goes before its name.

    The bytes of a remote file called ``.parquet`` are left to whoever reads its footer: a request less for each file.
    Raises :class:`InvalidInput` when neither name nor content tells, or when the content is of another kind.
    """
    name = uri.rsplit("/", 1)[-1].lower()
    ending = next((suffix for suffix in _CODECS if name.endswith(suffix)), "")
    named = _by_suffix(name.removesuffix(ending))
    if named is Kind.PARQUET and not ending and protocol(uri) != "file":
        return Format(named)
    head, tail = _ends(store, uri)
    columnar = _columnar(head)
    # The header of a CSV file may begin with PARENT or ARROW.
    certain = tail == head[:4] or head.startswith(_ARROW)
    if columnar is not None and (certain or named not in (Kind.JSONL, Kind.CSV)):
        return Format(columnar)
    if named in (Kind.JSONL, Kind.CSV):
        return Format(named, _packed(uri, head))
    if ending:
        raise InvalidInput(f"cannot read {uri}: only JSONL and CSV are read compressed as a whole", field="input")
    if named is None:
        _refuse_others(uri, head)
        raise InvalidInput(
            f"cannot tell the format of {uri}: name it {', '.join(_KINDS)} (JSONL and CSV also with .gz or .zst)",
            field="input",
        )
    return Format(named)


def is_not_data_file(store: ObjectStore, uri: str) -> bool:
    """Whether a file in a folder of data is evidently none itself (``readme.txt``): no format of ours, none of others.

    Names without a suffix are left to :func:`format_of`: warehouses write data under such.
    """
    name = uri.rsplit("/", 1)[-1].lower()
    if _SUFFIX.search(name) is None or _by_suffix(name) is not None or name.endswith(_TABLES):
        return False
    return _columnar(_ends(store, uri)[0]) is None


def _ends(store: ObjectStore, uri: str) -> tuple[bytes, bytes]:
    """The first bytes, and the last four where the first ones may be those of Parquet."""
    with store.open(uri) as file:
        head = file.read(_HEAD_BYTES)
        if not head.startswith(b"PAR") or file.seek(0, os.SEEK_END) < _HEAD_BYTES:
            return head, b""
        file.seek(-4, os.SEEK_END)
        return head, file.read(4)


def _columnar(head: bytes) -> Kind | None:
    return _MAGIC.get(head[:4])


def _packed(uri: str, head: bytes) -> Codec | None:
    """The codec around a text file. Raises :class:`InvalidInput` for a file that is no text at all."""
    _refuse_others(uri, head)
    return next((codec for magic, codec in _PACKED.items() if head.startswith(magic)), None)


def _refuse_others(uri: str, head: bytes) -> None:
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise InvalidInput(
                f"cannot read {uri}: by its first bytes it is {what}; turn it into Parquet, JSONL or CSV", field="input"
            )


def _by_suffix(name: str) -> Kind | None:
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), None)
