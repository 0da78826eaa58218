"""Directories of a cache that are made once, by whichever process comes first, and appear whole."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def made_once(final: Path, marker: str, make: Callable[[Path], None]) -> bool:
    """Have ``make`` fill a new directory, which becomes ``final``; true when it was made now.

    The file ``marker`` in it says that it is whole; ``make`` writes it last. Two processes that come at once end with
    the same directory: the second waits for the first. What processes that died left behind is removed.
    """
    if (final / marker).is_file():
        return False
    home, key = final.parent, final.name
    home.mkdir(parents=True, exist_ok=True)
    with _only_one(home / f".{key}.lock") as alone:
        if (final / marker).is_file():
            return False
        if alone:  # so these belong to a process that died
            for left in home.glob(f".{key}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".tmp", dir=home))
        try:
            make(work)
            if final.exists() and not (final / marker).is_file():
                shutil.rmtree(final)  # half deleted
            try:
                work.rename(final)
            except OSError:
                if not (final / marker).is_file():  # otherwise another process was faster
                    raise
                return False
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return True


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[bool]:
    """Hold a lock between processes; yields false where the filesystem has none (then work may be done twice)."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
