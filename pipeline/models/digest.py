"""The identity of a model's files: one SHA-256 over their names and contents, hashing only what changed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from storage.logs import pool_with_ids

CACHE_FILE = "model-digests.json"
_FORMAT = 1
_THREADS = 4
"""``hashlib`` lets other threads run; past a few, disks are the limit."""
_MOST_ENTRIES = 10_000

_Stamp = list[int]


def digest(files: Mapping[str, Path], cache_dir: Path) -> str:
    """SHA-256 (hex) over the sorted names and the contents of ``files`` (name → file).

    Hashes of single files are kept in ``cache_dir``, under path, size, modification and change time and inode, so that
    a second call reads no content. A cache that cannot be read or written is done without. Raises ``OSError`` when a
    file of the model cannot be read.
    """
    return combined(file_hashes(files, cache_dir))


def file_hashes(files: Mapping[str, Path], cache_dir: Path) -> dict[str, str]:
    """Name → SHA-256 (hex) of the file's content, of each of ``files``, sorted by name. Raises ``OSError``."""
    cache = _Cache(cache_dir / CACHE_FILE)
    names = sorted(files)
    paths = [files[name].resolve() for name in names]
    with pool_with_ids(_THREADS, "rowmill-digest") as pool:
        hashes = list(pool.map(cache.file_hash, paths))
    cache.save()
    return dict(zip(names, hashes, strict=True))


def combined(hashes: Mapping[str, str]) -> str:
    """The digest of a model whose files have these hashes."""
    total = hashlib.sha256()
    for name in sorted(hashes):
        total.update(f"{len(name.encode())}:{name}:{hashes[name]}\n".encode())
    return total.hexdigest()


class _Cache:
    """Path → (stamp, SHA-256). Written whole and renamed: concurrent processes at worst lose each other's entries."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = _read(file)
        self._fresh: dict[str, tuple[_Stamp, str]] = {}

    def file_hash(self, path: Path) -> str:
        """SHA-256 (hex) of one file's content."""
        with path.open("rb") as file:
            before = _stamp(file.fileno())
            known = self._known.get(str(path))
            if known is not None and known[0] == before:
                return known[1]
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if _stamp(file.fileno()) == before:
                self._fresh[str(path)] = (before, found)
        return found

    def save(self) -> None:
        if not self._fresh:
            return
        # Read again: another process may have added to it since. The newest entries stay when it grows too large.
        entries = {path: entry for path, entry in _read(self._file).items() if path not in self._fresh}
        entries |= self._fresh
        kept = dict(list(entries.items())[-_MOST_ENTRIES:])
        temporary = None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._file.parent, prefix=CACHE_FILE, delete=False, encoding="utf-8"
            ) as out:
                temporary = Path(out.name)
                json.dump({"format": _FORMAT, "files": kept}, out)
            temporary.replace(self._file)
        except OSError:
            # A cache folder that is full or read-only costs time, never the job.
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def _stamp(descriptor: int) -> _Stamp:
    stat = os.fstat(descriptor)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read(file: Path) -> dict[str, tuple[_Stamp, str]]:
    try:
        content = json.loads(file.read_bytes())
        if content["format"] != _FORMAT:
            return {}
        return {str(path): ([int(n) for n in stamp], str(found)) for path, (stamp, found) in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # missing, damaged or of another version: it is rewritten
