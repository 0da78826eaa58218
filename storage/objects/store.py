"""Objects on anything that fsspec reads and writes, local paths first: open, put, list, publish, delete.

Errors that may pass are tried again here and nowhere else (see :mod:`storage.objects.retry`).
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from storage.errors import CorruptFile, InvalidInput, Unreachable
from storage.locations import WORK_FOLDER, normalize, protocol
from storage.logs import pool_with_ids
from storage.objects import filesystems, listing, local_files
from storage.objects.errors import explain
from storage.objects.info import ObjectInfo, check_name, exactly, listed, local_info, remote_info
from storage.objects.local_files import OnConflict
from storage.objects.new_file import NewFile, NewLocalFile, NewRemoteFile, NewStreamedFile, Written
from storage.objects.range_reader import RangeReader
from storage.objects.reader_cache import OpenReaderCache
from storage.objects.retry import response_code, retrying

__all__ = ["NewFile", "ObjectInfo", "ObjectStore", "Written"]

T = TypeVar("T")

RETRY_SECONDS = 60.0
"""How long one operation is tried again before it counts as unreachable."""
_CHUNK = 2**20
_PART_BYTES = 16 * 2**20
"""S3 takes 10,000 parts of a file."""
_DELETERS = 8
_MARK = "rowmill-put"
_THERE_ALREADY = ("PreconditionFailed", "412")


class ObjectStore:
    """Files by path or URL. Safe to share between threads; one per process.

    ``options``: protocol → fsspec's own options, from the operator's settings. ``retry_seconds`` bounds how long one
    operation is repeated after errors that may pass; then it raises :class:`~storage.errors.Unreachable`. A missing or
    forbidden object is :class:`~storage.errors.InvalidInput`, a full disk :class:`~storage.errors.StorageFull`; every
    error names the object.
    """

    def __init__(
        self, options: Mapping[str, Mapping[str, Any]] | None = None, *, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self._options = {name: dict(values) for name, values in (options or {}).items()}
        self._retry_seconds = retry_seconds
        self._filesystems: dict[tuple[int, str], Any] = {}
        self._lock = threading.Lock()
        self.open_readers = OpenReaderCache()
        """Parquet readers that stopped within a file, for the shard that goes on there."""

    def close(self) -> None:
        """Let go of files that were left open. The store can still be used."""
        self.open_readers.close()

    def stat(self, uri: str) -> ObjectInfo | None:
        """The object's size and etag; ``None`` when there is none (a folder is none)."""
        uri = normalize(uri)

        def look() -> ObjectInfo | None:
            try:
                if protocol(uri) == "file":
                    path = Path(uri)
                    return local_info(uri) if path.stat() and not path.is_dir() else None
                info = self._fresh(uri).info(self._path(uri))
            except (FileNotFoundError, NotADirectoryError):
                return None
            return remote_info(uri, info) if info["type"] == "file" else None

        return self._call(uri, look)

    def info(self, uri: str) -> ObjectInfo:
        """Like :meth:`stat`; raises :class:`InvalidInput` when there is no such object."""
        found = self.stat(uri)
        if found is None:
            raise InvalidInput(f"{uri} does not exist")
        return found

    def exists(self, uri: str) -> bool:
        return self.stat(uri) is not None

    def find(self, pattern: str, *, changing: bool = False) -> list[ObjectInfo]:
        """The objects that a path, a folder (all below it) or a glob (``**`` too) stands for, sorted by name.

        Names beginning with ``.`` or ``_`` are left out, as Spark and Hive do. Empty when nothing matches. What is
        deleted while it is listed is an error, or left out where files come and go (``changing``).
        """
        pattern = normalize(pattern)

        def look() -> list[ObjectInfo]:
            if protocol(pattern) == "file":
                paths = listing.local_files_of(pattern, changing=changing)
                found = [info for path in paths if (info := listed(path, changing=changing)) is not None]
            else:
                items = listing.remote_files_of(self._fresh(pattern), self._path(pattern))
                found = [remote_info(self._url(pattern, name), info) for name, info in items.items()]
            for item in found:
                check_name(item.uri)
            return sorted(found, key=lambda item: item.uri)

        return self._call(pattern, look)

    def open(self, uri: str) -> BinaryIO:
        """A seekable binary reader, also for pyarrow. Its reads are tried again like everything else.

        A remote one is a :class:`RangeReader`: told what will be read, it fetches that and nothing else.
        """
        uri = normalize(uri)
        if protocol(uri) == "file":
            return self._call(uri, lambda: cast(BinaryIO, Path(uri).open("rb")))
        file = self._call(uri, lambda: self._fresh(uri).open(self._path(uri), "rb", cache_type="none"))

        def fetch(lo: int, hi: int) -> bytes:
            return self._call(uri, lambda: exactly(file, lo, hi))

        etag = remote_info(uri, file.details).etag if getattr(file, "read_kw", {}).get("IfMatch") else None
        return cast(BinaryIO, RangeReader(file.size, fetch, file.close, etag))

    def read_bytes(self, uri: str) -> bytes:
        uri = normalize(uri)
        if protocol(uri) == "file":
            return self._call(uri, lambda: Path(uri).read_bytes())
        return self._call(uri, lambda: cast(bytes, self._fresh(uri).cat_file(self._path(uri))))

    def create(self, uri: str, *, on_conflict: OnConflict = "replace") -> NewFile:
        """A new file to write in a ``with`` block: published when it ends well, else it never was.

        ``on_conflict="keep"`` lets an object that is there already stand (for content that its name determines).
        """
        uri = normalize(uri)
        if protocol(uri) == "file":
            return NewLocalFile(uri, on_conflict)
        if on_conflict == "fail":
            raise ValueError("only put_bytes creates conditionally at a remote store")
        return NewRemoteFile(uri, partial(self._upload, uri, on_conflict))

    def stream(self, uri: str) -> NewFile:
        """Like :meth:`create`; a remote file is sent in parts while it is written, and takes no room on this machine.

        An error in the midst of it ends it: unlike :meth:`create` it cannot begin again.
        """
        uri = normalize(uri)
        if protocol(uri) in ("file", "memory"):
            return self.create(uri)

        def opened() -> Any:
            return self._filesystem(uri).open(self._path(uri), "wb", block_size=_PART_BYTES, autocommit=False)

        return NewStreamedFile(uri, opened, lambda: self.info(uri).etag)

    def upload(self, path: str, uri: str, *, part_bytes: int) -> None:
        """Upload a local file of two times ``part_bytes`` or more in parts of that size, where the store is S3.

        What :meth:`create` does for large files, for a smaller one.
        """
        self._call(
            uri,
            lambda: self._filesystem(uri).put_file(path, self._path(uri), chunksize=part_bytes),
            writing=True,
        )

    def put_bytes(self, uri: str, data: bytes, *, if_absent: bool = False) -> Written:
        """Write a small object in one step. With ``if_absent``, ``FileExistsError`` when there is one already."""
        uri = normalize(uri)
        if protocol(uri) == "file":
            with NewLocalFile(uri, "fail" if if_absent else "replace") as file:
                file.write(data)
            return file.written
        self._put_remote(uri, data, if_absent)
        found = self.info(uri)
        return Written(uri, len(data), hashlib.sha256(data).hexdigest(), found.etag)

    def verify(self, written: Written) -> None:
        """Read the object again; raises :class:`CorruptFile` when it is not what was written."""
        self.verify_content(written.uri, written.n_bytes, written.sha256)

    def verify_content(self, uri: str, n_bytes: int, sha256: str) -> None:
        """Like :meth:`verify`, from the size and the hash alone."""
        found = self.stat(uri)
        if found is None:
            raise CorruptFile(f"{uri} is gone")
        if found.n_bytes != n_bytes:
            raise CorruptFile(f"{uri} has {found.n_bytes} bytes, not the {n_bytes} that were written")
        if (actual := self._sha256(uri)) != sha256:
            raise CorruptFile(f"{uri} is not what was written: its SHA-256 is {actual}, not {sha256}")

    def holds(self, uri: str, sha256: str) -> bool:
        """Whether there is such an object, with this content. Reads all of it."""
        return self.exists(uri) and self._sha256(uri) == sha256

    def publish(self, source: str, target: str, *, sha256: str | None = None, n_bytes: int | None = None) -> None:
        """Make ``source``'s content appear as ``target`` in one step, without moving it through this process.

        Local: a hard link (a copy where links are unsupported); remote: a copy within the store. Converges: run again
        after ``source`` was collected, it is content with a target that has this ``sha256``; otherwise it raises
        :class:`CorruptFile`. So it does when ``source`` is not ``n_bytes`` long.
        """
        source, target = normalize(source), normalize(target)
        found = self.stat(source)
        if found is None:
            if sha256 is not None and self.holds(target, sha256):
                return
            raise CorruptFile(f"{source} is gone, and {target} does not hold its content")
        if n_bytes is not None and found.n_bytes != n_bytes:
            if sha256 is not None and self.holds(target, sha256):
                return
            raise CorruptFile(f"{source} is {found.n_bytes:,} bytes long, and {n_bytes:,} were written")
        if protocol(source) == protocol(target) == "file":
            if not self._call(target, lambda: local_files.link(Path(source), Path(target)), writing=True):
                self._copy(source, target)
            return
        if protocol(source) != protocol(target):
            self._copy(source, target)
            return
        filesystem = self._fresh(target)
        self._call(target, lambda: filesystem.cp_file(self._path(source), self._path(target)), writing=True)
        if self.info(target).n_bytes != found.n_bytes:
            raise CorruptFile(f"{target} is not as long as {source}, which was copied there")

    def delete(self, uris: Iterable[str]) -> None:
        """Delete objects; absent ones are fine."""
        paths = [normalize(uri) for uri in uris]
        if len(paths) <= 1 or all(protocol(path) == "file" for path in paths):
            for path in paths:
                self._delete_one(path)
            return
        with pool_with_ids(_DELETERS, "rowmill-delete") as pool:
            list(pool.map(self._delete_one, paths))

    def list_tree(self, prefix: str) -> list[str]:
        """Every object below a folder, hidden or not, for :meth:`delete_tree`."""
        prefix = normalize(prefix)
        if protocol(prefix) != "file":
            # Not fsspec's recursive rm later, which would expand wildcards in the name.
            found = self._call(prefix, lambda: cast(list[str], self._fresh(prefix).find(self._path(prefix))))
            return [self._url(prefix, name) for name in found]
        walk = self._call(prefix, lambda: list(os.walk(prefix)))
        return [f"{folder}/{name}" for folder, _, names in walk for name in names]

    def delete_tree(self, prefix: str, files: Iterable[str] | None = None) -> None:
        """Delete everything below a folder, hidden or not, or of it just ``files``, which :meth:`list_tree` named
        earlier. Local work folders that this empties go too."""
        prefix = normalize(prefix)
        if protocol(prefix) != "file":
            if "/" not in self._path(prefix).strip("/"):
                raise ValueError(f"refusing to delete all of {prefix}")
            self.delete(self.list_tree(prefix) if files is None else files)
            return
        folder = Path(prefix)
        if folder == folder.parent:
            raise ValueError("refusing to delete the root folder")

        def remove() -> None:
            if files is None:
                local_files.remove_tree(folder, WORK_FOLDER)
            else:
                local_files.remove_files(folder, files, WORK_FOLDER)

        self._call(prefix, remove, writing=True)

    def arrow_filesystem(self, uris: Sequence[str]) -> tuple[Any, list[str]]:
        """A ``pyarrow.fs.FileSystem``, and the paths in it of objects that all live at one store."""
        from pyarrow import fs

        paths = [normalize(uri) for uri in uris]
        if all(protocol(path) == "file" for path in paths):
            return fs.LocalFileSystem(), paths
        handler = fs.FSSpecHandler(self._filesystem(paths[0]))  # type: ignore[abstract]
        return fs.PyFileSystem(handler), [self._path(path) for path in paths]

    def _call(self, uri: str, call: Callable[[], T], *, writing: bool = False) -> T:
        try:
            return retrying(call, what=uri, seconds=self._retry_seconds)
        except (Unreachable, FileExistsError):
            raise
        except Exception as error:
            ours = explain(uri, error, writing=writing)
            if ours is None or ours is error:
                raise
            raise ours from error

    def _filesystem(self, uri: str) -> Any:
        name = protocol(uri)
        key = (os.getpid(), name)  # a file system's event loop does not survive a fork
        with self._lock:
            if key not in self._filesystems:
                self._filesystems[key] = filesystems.opened(uri, name, self._options)
            return self._filesystems[key]

    def _fresh(self, uri: str) -> Any:
        """The file system, without listings kept from before."""
        filesystem = self._filesystem(uri)
        filesystem.invalidate_cache()
        return filesystem

    def _path(self, uri: str) -> str:
        return cast(str, self._filesystem(uri)._strip_protocol(uri))

    def _url(self, like: str, name: str) -> str:
        """The URL of an fsspec name, with the same scheme as ``like``."""
        scheme, _, rest = like.partition("://")
        if not rest.startswith("/"):
            name = name if "://" in name else name.removeprefix("/")
        return name if "://" in name else f"{scheme}://{name}"

    def _upload(self, uri: str, on_conflict: OnConflict, path: str) -> tuple[int, str]:
        if on_conflict == "keep" and (found := self.stat(uri)):
            return Path(path).stat().st_size, found.etag
        self._call(uri, lambda: self._filesystem(uri).put_file(path, self._path(uri)), writing=True)
        found = self.info(uri)
        return found.n_bytes, found.etag

    def _put_remote(self, uri: str, data: bytes, if_absent: bool) -> None:
        filesystem, path = self._filesystem(uri), self._path(uri)
        mode = "create" if if_absent else "overwrite"
        # Below us, the HTTP library may send a request again after its answer was lost: then it is our own object that
        # is in the way, which only a mark of our own can tell.
        mark = {"Metadata": {_MARK: secrets.token_hex(8)}} if if_absent and protocol(uri) in ("s3", "s3a") else {}

        def put() -> None:
            try:
                filesystem.pipe_file(path, data, mode=mode, **mark)
            except OSError as error:
                if not isinstance(error, FileExistsError) and response_code(error) not in _THERE_ALREADY:
                    raise
                if not mark or filesystem.metadata(path, refresh=True).get(_MARK) != mark["Metadata"][_MARK]:
                    raise FileExistsError(f"{uri} exists") from error

        self._call(uri, put, writing=True)

    def _sha256(self, uri: str) -> str:
        with self.open(uri) as file:
            return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()

    def _copy(self, source: str, target: str) -> None:
        with self.open(source) as reader, self.create(target) as writer:
            while chunk := reader.read(_CHUNK):
                writer.write(chunk)

    def _delete_one(self, uri: str) -> None:
        def remove() -> None:
            try:
                if protocol(uri) == "file":
                    Path(uri).unlink()
                else:
                    self._filesystem(uri).rm_file(self._path(uri))
            except FileNotFoundError:
                pass

        self._call(uri, remove, writing=True)
