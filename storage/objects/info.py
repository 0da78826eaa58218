"""What a store says of one object, and reading a part of it: the differences between fsspec's file systems."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from storage.errors import InvalidInput
from storage.objects import local_files


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object. ``etag`` changes when its content does."""

    uri: str
    n_bytes: int
    etag: str


def check_name(uri: str) -> None:
    """Raise :class:`InvalidInput` for a file or folder whose name is not UTF-8: nothing could store or show it."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        shown = uri.encode(errors="backslashreplace").decode()
        raise InvalidInput(f"the name of {shown} is not valid UTF-8; rename the file or folder") from None


def local_info(path: str) -> ObjectInfo:
    stat = os.stat(path)  # noqa: PTH116
    local_files.refuse_special(path, stat)
    return ObjectInfo(path, stat.st_size, local_files.etag(stat))


def listed(path: str, *, changing: bool) -> ObjectInfo | None:
    try:
        return local_info(path)
    except FileNotFoundError:
        if not changing:
            local_files.refuse_dangling(path)
            raise
        return None


def remote_info(uri: str, info: Mapping[str, Any]) -> ObjectInfo:
    """Stores name their version differently; without any, the time of the last change and the size must do."""
    n_bytes = int(info["size"] or 0)
    for name in ("ETag", "etag", "md5Hash", "generation"):
        if info.get(name):
            return ObjectInfo(uri, n_bytes, str(info[name]).strip('"'))
    changed = next(
        (info[n] for n in ("LastModified", "last_modified", "mtime", "updated", "created") if info.get(n)), ""
    )
    return ObjectInfo(uri, n_bytes, f"{n_bytes:x}-{changed}")


def exactly(file: Any, lo: int, hi: int) -> bytes:
    """Bytes ``[lo, hi)`` of an fsspec file without a cache: one request."""
    file.seek(lo)
    try:
        data = cast(bytes, file.read(hi - lo))
    except IndexError as error:
        # s3fs looks into the arguments of a time-out, which has none.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    if len(data) != hi - lo:
        raise ConnectionError(f"the store sent {len(data)} bytes of the {hi - lo} asked for")
    return data
