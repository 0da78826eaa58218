"""Files of this machine, written so that a crash leaves the old content, the new content, or nothing."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFMT, S_IFSOCK, S_ISREG
from typing import IO, Any, Literal

from storage.errors import InvalidInput, InvalidSettings

OnConflict = Literal["replace", "keep", "fail"]
"""When the target exists: replace it, keep it (the new content is dropped), or raise ``FileExistsError``."""

_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})


_KINDS = {
    S_IFIFO: "a named pipe",
    S_IFSOCK: "a socket",
    S_IFCHR: "a device",
    S_IFBLK: "a device",
    S_IFDIR: "a folder",
}


_DESCRIPTORS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


def refuse_special(path: str, stat: os.stat_result) -> None:
    """Raise :class:`InvalidInput` for what is no regular file: to read a pipe could wait for ever."""
    if not S_ISREG(stat.st_mode):
        raise InvalidInput(f"{path} is {_KINDS.get(S_IFMT(stat.st_mode), 'something else')}, not a file")


def read_given(path: Path) -> bytes:
    """The content of a file that a user names, or of a shell's ``<(…)``. Raises :class:`InvalidInput` for anything
    else that could be read for ever, as well as ``OSError``."""
    if not str(path).startswith(_DESCRIPTORS):
        refuse_special(str(path), path.stat())
    return path.read_bytes()


def make_room(database: Path) -> None:
    """Make the folder of a database's file. Raises :class:`InvalidSettings` where there can be no such file."""
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        if database.exists():
            refuse_special(str(database), database.stat())
    except InvalidInput as error:
        raise InvalidSettings(f"{error.message}, and a database is one", field="database_url") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidSettings(
            f"the folder {database.parent} cannot be made ({reason.lower()}); set data_dir or database_url to a place "
            "that can be written"
        ) from error


def refuse_dangling(path: str, *, above: bool = True) -> None:
    """Raise :class:`InvalidInput` where a path (``above``: or a folder on its way) is a link that leads nowhere."""
    for place in (Path(path), *(Path(path).parents if above else ())):
        if place.is_symlink() and not place.exists():
            raise InvalidInput(
                f"{place} is a symbolic link to {place.readlink()}, which leads nowhere; restore what it leads to, or "
                "remove the link"
            )


def etag(stat: os.stat_result) -> str:
    """Changes when the file is replaced or written to. Nanoseconds, since two writes may fall into one second."""
    return f"{stat.st_size:x}-{stat.st_mtime_ns:x}-{stat.st_ino:x}"


def open_temporary(target: Path) -> tuple[IO[bytes], Path]:
    """A new file beside ``target`` (whose folders are made), under a hidden name that no ``*.parquet`` matches."""
    while True:
        make_dirs(target.parent)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        try:
            return temporary.open("xb"), temporary
        except FileNotFoundError:
            # The folder was empty and was tidied away in between, by delete_tree of a neighbour.
            if target.parent.is_dir():
                raise


def publish(temporary: Path, target: Path, on_conflict: OnConflict) -> bool:
    """Give a finished, synced file its real name in one step; false when an existing target was kept."""
    if on_conflict == "replace":
        temporary.replace(target)
    else:
        try:
            _link_new(temporary, target)
        except FileExistsError:
            if on_conflict == "fail":
                raise
            return False
        finally:
            temporary.unlink(missing_ok=True)
    sync_dir(target.parent)
    return True


def _link_new(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Without hard links: reserve the name, then fill it. Of several writers one wins; a reader may see it empty.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary.replace(target)


def link(source: Path, target: Path) -> bool:
    """Make ``target`` another name of ``source``, replacing it in one step; false where links are not supported."""
    make_dirs(target.parent)
    # The temporary name stands beside the source, so that a crash leaves nothing among the published files.
    temporary = source.with_name(f".{source.name}.{secrets.token_hex(6)}.tmp")
    try:
        os.link(source, temporary)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    try:
        temporary.replace(target)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    finally:
        # Two names of one file: replace() then does nothing and leaves both.
        temporary.unlink(missing_ok=True)
    sync_dir(target.parent)
    return True


def make_dirs(folder: Path) -> None:
    """Make a folder and what is missing above it, each durably.

    Raises ``NotADirectoryError`` where a file or a link that leads nowhere has the name of one of them; never
    ``FileExistsError``, which says that the file itself is there.
    """
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        try:
            path.mkdir(exist_ok=True)
        except FileExistsError:
            what = "a link that leads nowhere" if path.is_symlink() else "a file"
            raise NotADirectoryError(errno.ENOTDIR, f"{path} is {what}, not a folder") from None
        sync_dir(path.parent)


def sync_dir(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems refuse to sync a folder: there, the rename is as durable as it gets.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def remove_tree(folder: Path, upto: str) -> None:
    """Delete a folder and all in it, whoever else is at it, and the folders above that this empties, up to ``upto``.

    ``upto`` is a folder's name; where none above has it, nothing above is touched.
    """

    def gone_is_fine(function: object, path: str, error: tuple[type[BaseException], BaseException, Any]) -> None:
        if not isinstance(error[1], FileNotFoundError):
            raise error[1]

    shutil.rmtree(folder, onerror=gone_is_fine)
    _remove_empty_above(folder, upto)


def remove_files(folder: Path, files: Iterable[str], upto: str) -> None:
    """Delete some files below ``folder``, and every folder that this empties, up to ``upto`` above it."""
    for file in files:
        Path(file).unlink(missing_ok=True)
    for path, _, _ in os.walk(folder, topdown=False):
        _remove_empty(Path(path))
    _remove_empty_above(folder, upto)


def _remove_empty_above(folder: Path, upto: str) -> None:
    names = [parent.name for parent in folder.parents]
    if upto not in names:
        return
    for parent in list(folder.parents)[: names.index(upto) + 1]:
        if not _remove_empty(parent):
            return


def _remove_empty(folder: Path) -> bool:
    """False when something is in it."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one. Raises :class:`InvalidInput` for links that lead to each other."""
    try:
        return entry.is_dir()
    except OSError:
        refuse_dangling(entry.path)
        raise


def walk(folder: str, above: frozenset[tuple[int, int]] = frozenset(), *, changing: bool = False) -> Iterator[str]:
    """Everything below ``folder`` that is no folder, through symbolic links too; pipes and dangling links are among it.
    Raises :class:`InvalidInput` where links form a ring.

    A folder that is deleted before it is read raises ``FileNotFoundError``, or is left out where they come and go
    (``changing``).
    """
    try:
        stat = os.stat(folder)  # noqa: PTH116
        here = (stat.st_dev, stat.st_ino)
        if here in above:
            raise InvalidInput(f"{folder} is a symbolic link to a folder that contains it")
        opened = os.scandir(folder)
    except FileNotFoundError:
        if not changing:
            raise
        return
    with opened as entries:
        for entry in entries:
            if is_folder(entry):
                yield from walk(entry.path, above | {here}, changing=changing)
            else:
                yield entry.path
