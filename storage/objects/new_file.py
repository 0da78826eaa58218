"""A file being written: counted and hashed on the way, published in one step at the end, or never."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from storage.errors import RowmillError
from storage.objects import local_files
from storage.objects.errors import explain
from storage.objects.local_files import OnConflict


@dataclass(frozen=True, slots=True)
class Written:
    """What was written, as it was hashed on the way: ``sha256`` is hex. ``etag`` is the store's, after publishing."""

    uri: str
    n_bytes: int
    sha256: str
    etag: str


class NewFile(io.RawIOBase):
    """A writable binary file, and the context manager that publishes it.

    A clean exit publishes it atomically and sets ``written``; an exception, or never getting there, leaves nothing
    behind. Raises :class:`~storage.errors.StorageFull` or another :class:`RowmillError` that names the target.
    """

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.uri = uri
        self._hash = hashlib.sha256()
        self._n_bytes = 0
        self._written: Written | None = None
        try:
            self._file, self._temporary = self._open()
        except OSError as error:
            raise explain(uri, error, writing=True) or error from error

    @property
    def written(self) -> Written:
        """What was published. Only after a clean exit."""
        if self._written is None:
            raise RuntimeError(f"{self.uri} is not published yet")
        return self._written

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._n_bytes

    def write(self, data: Any) -> int:
        """Append bytes (any contiguous buffer); returns how many."""
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            raise explain(self.uri, error, writing=True) or error from error
        self._hash.update(view)
        self._n_bytes += view.nbytes
        return view.nbytes

    def close(self) -> None:
        """Give up what was not published."""
        if not self.closed:
            super().close()
            # A file that could not even be opened has neither attribute.
            if "_file" in self.__dict__:
                self._discard()

    def _discard(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # the buffer does not fit on a full disk: it was to be thrown away
        finally:
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._written = self._publish()
        except FileExistsError:
            raise
        except OSError as problem:
            raise explain(self.uri, problem, writing=True) or problem from problem
        finally:
            self.close()

    @abstractmethod
    def _open(self) -> tuple[IO[bytes], Path]: ...

    @abstractmethod
    def _publish(self) -> Written: ...


class NewLocalFile(NewFile):
    """Written under a temporary name in the target's folder, synced, then renamed."""

    def __init__(self, uri: str, on_conflict: OnConflict = "replace") -> None:
        self._on_conflict = on_conflict
        super().__init__(uri)

    def _open(self) -> tuple[IO[bytes], Path]:
        return local_files.open_temporary(Path(self.uri))

    def _publish(self) -> Written:
        target = Path(self.uri)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        local_files.publish(self._temporary, target, self._on_conflict)
        return Written(self.uri, self._n_bytes, self._hash.hexdigest(), local_files.etag(target.stat()))


class NewRemoteFile(NewFile):
    """Spooled to a local file, then uploaded whole: a broken upload is simply begun again, and is invisible till then.

    ``upload`` takes the local path and returns the object's size and etag at the store.
    """

    def __init__(self, uri: str, upload: Callable[[str], tuple[int, str]]) -> None:
        self._upload = upload
        super().__init__(uri)

    def _open(self) -> tuple[IO[bytes], Path]:
        handle, name = tempfile.mkstemp(prefix="rowmill-upload-")
        return os.fdopen(handle, "wb"), Path(name)

    def _publish(self) -> Written:
        self._file.close()
        n_bytes, etag = self._upload(str(self._temporary))
        if n_bytes != self._n_bytes:
            raise RowmillError(f"{self.uri} has {n_bytes} bytes after an upload of {self._n_bytes}")
        return Written(self.uri, self._n_bytes, self._hash.hexdigest(), etag)


class NewStreamedFile(NewFile):
    """Sent to a remote store in parts while it is written, and completed at the end: no local disk is needed.

    ``opened`` opens fsspec's file, which completes nothing before its ``commit``. What a process that dies leaves
    behind are the parts of an upload that was never completed; the store's own rules for these delete them.
    """

    def __init__(self, uri: str, opened: Callable[[], Any], etag: Callable[[], str]) -> None:
        self._opened, self._etag = opened, etag
        super().__init__(uri)

    def _open(self) -> tuple[IO[bytes], Path]:
        return self._opened(), Path()

    def _publish(self) -> Written:
        remote: Any = self._file
        remote.close()
        remote.commit()
        return Written(self.uri, self._n_bytes, self._hash.hexdigest(), self._etag())

    def _discard(self) -> None:
        remote: Any = self._file
        if self._written is None:
            with suppress(OSError):  # whoever could not send it, may not be able to take it back either
                remote.discard()
            remote.closed = True  # else it sends what it holds when it is collected
