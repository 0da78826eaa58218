"""Files by name, folder or glob: the same answer on every object store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import fsspec
from fsspec.utils import glob_translate

from storage import local_files
from storage.errors import InvalidInput

_MAGIC = re.compile(r"[*?\[]")


def is_glob(pattern: str) -> bool:
    return _MAGIC.search(pattern) is not None


def literal_prefix(pattern: str) -> str:
    """The folders of a glob before the first wildcard, without a trailing slash."""
    parts = pattern.split("/")
    first = next((at for at, part in enumerate(parts) if is_glob(part)), len(parts) - 1)
    return "/".join(parts[:first])


def matches(pattern: str, path: str) -> bool:
    """Whether a glob matches a path. Raises :class:`InvalidInput` for a glob that makes no sense."""
    try:
        return re.match(glob_translate(pattern), path) is not None
    except ValueError as error:
        raise InvalidInput(f"{pattern}: {error}") from None


def visible(paths: Iterable[str], root: str, pattern: str) -> Iterator[str]:
    """The paths below ``root`` that hold data, as Spark and Hive see it.

    Names that begin with ``.`` or ``_`` are bookkeeping, and so is all below them, unless they are partition folders
    (``_k=v``) or the glob itself spells them out.
    """
    explicit = [part for part in pattern.split("/") if part[:1] in (".", "_")]
    for path in paths:
        names = path[len(root) :].strip("/").split("/")
        if all(not _hidden(name) or any(fnmatchcase(name, part) for part in explicit) for name in names):
            yield path


def _hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def local_files_of(pattern: str) -> list[str]:
    """Paths of the local files that a path, a folder or a glob stands for; unsorted, possibly none."""
    if os.path.isfile(pattern):  # noqa: PTH113
        return [pattern]
    if os.path.isdir(pattern):  # noqa: PTH112
        return list(visible(local_files.walk(pattern), pattern, pattern))
    if not is_glob(pattern):
        return []
    matches(pattern, "")
    found: dict[str, None] = {}
    for path in fsspec.filesystem("file").glob(pattern):
        if os.path.isdir(path):  # noqa: PTH112
            found |= dict.fromkeys(local_files.walk(path))
        else:
            found[path] = None
    return list(visible(found, literal_prefix(pattern), pattern))


def remote_files_of(filesystem: Any, pattern: str) -> dict[str, dict[str, Any]]:
    """The same on an fsspec file system: its name of each file → its info."""
    try:
        info = filesystem.info(pattern)
    except FileNotFoundError:
        info = None
    if info is not None:
        if info["type"] == "file":
            return {info["name"]: info}
        found, root = filesystem.find(pattern, detail=True), pattern
    elif is_glob(pattern):
        matches(pattern, "")
        found, root = {}, literal_prefix(pattern)
        for name, item in filesystem.glob(pattern, detail=True).items():
            found |= filesystem.find(name, detail=True) if item["type"] == "directory" else {name: item}
    else:
        return {}
    # An empty object whose name ends in a slash only marks a folder.
    names = [name for name, item in found.items() if item["type"] == "file" and not name.endswith("/")]
    return {name: found[name] for name in visible(names, root, pattern)}
