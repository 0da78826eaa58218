"""Files by name, folder or glob: the same answer on every object store."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from fsspec.utils import glob_translate

from storage.errors import InvalidInput
from storage.objects import local_files

_MAGIC = re.compile(r"[*?\[]")


def is_glob(pattern: str) -> bool:
    return _MAGIC.search(pattern) is not None


def literal_brackets(pattern: str) -> str:
    """The pattern in which ``[`` stands for itself."""
    return pattern.replace("[", "[[]")


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


def local_files_of(pattern: str, *, changing: bool = False) -> list[str]:
    """Paths of the local files that a path, a folder or a glob stands for; unsorted, possibly none.

    ``changing``: folders below a folder may go meanwhile, and are left out then.
    """
    try:
        mode = os.stat(pattern).st_mode  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        mode = 0  # anything else, such as a folder above that may not be entered, is an error
        if not changing:
            local_files.refuse_dangling(pattern)
    if stat.S_ISDIR(mode):
        return list(visible(local_files.walk(pattern, changing=changing), pattern, pattern))
    if mode:
        return [pattern]
    if not is_glob(pattern):
        return []
    matches(pattern, "")
    root = literal_prefix(pattern)
    files = (path for place in _local_matches(pattern, root) for path in _all_below(place))
    return list(visible(dict.fromkeys(files), root, pattern))


def _all_below(path: str) -> Iterable[str]:
    return local_files.walk(path) if os.path.isdir(path) else [path]  # noqa: PTH112


def _local_matches(pattern: str, root: str) -> Iterator[str]:
    """Files and folders that match. Not fsspec's glob: it leaves out what it may not read, and so loses rows."""
    try:
        os.stat(root or "/")  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return
    if "**" in pattern:
        above = root.count("/") + 1
        for path in local_files.walk(root or "/"):
            parts = path.split("/")
            if any(matches(pattern, "/".join(parts[:n])) for n in range(above + 1, len(parts) + 1)):
                yield path
            elif any(visible([path], root, pattern)):  # perhaps a link to a folder with files that would match
                local_files.refuse_dangling(path, above=False)
        return
    parts = pattern.split("/")
    folders = [root]
    for depth in range(root.count("/") + 1, len(parts)):
        here = "/".join(parts[: depth + 1])
        found = [entry for folder in folders for entry in _entries(folder) if matches(here, entry.path)]
        if depth == len(parts) - 1:
            yield from (entry.path for entry in found)
        folders = []
        for entry in found:
            if local_files.is_folder(entry):
                folders.append(entry.path)
            elif depth < len(parts) - 1:
                local_files.refuse_dangling(entry.path)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder or "/") as entries:
        return list(entries)


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
