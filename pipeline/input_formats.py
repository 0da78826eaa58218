"""Which format an input file has: by the end of its name, or by its first bytes where the name says nothing."""

from __future__ import annotations

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
_MAGIC = {b"PAR1": Kind.PARQUET, b"ARRO": Kind.IPC}


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
    if known is None:
        with store.open(uri) as file:
            known = _MAGIC.get(file.read(4))
    if known is None:
        raise InvalidInput(
            f"cannot tell the format of {uri}: name it {', '.join(_KINDS)} (JSONL and CSV also with .gz or .zst)",
            field="input",
        )
    return Format(known)


def _by_suffix(name: str) -> Kind | None:
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), None)
