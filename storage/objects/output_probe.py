"""Whether a place can hold an output: every kind of request that a job makes there, tried on objects of its own."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from storage.errors import InvalidInput, InvalidJob, RowmillError, TransientError
from storage.locations import protocol
from storage.objects.store import ObjectStore

PUT, GET, LIST, CONDITIONAL, COPY, PARTS, DELETE, LOOK = (
    "put", "get", "list", "conditional put", "copy", "multi-part upload", "delete", "look for an object",
)  # fmt: skip
_PART_BYTES = 5 * 2**20
"""The smallest that S3 takes."""
_CONTENT = b"rowmill tries whether it can write here\n"

_S3 = {
    PUT: "s3:PutObject", GET: "s3:GetObject (GET and HEAD)", LIST: "s3:ListBucket",
    CONDITIONAL: "s3:PutObject with the header If-None-Match", COPY: "s3:GetObject and s3:PutObject (CopyObject)",
    PARTS: "s3:PutObject and s3:AbortMultipartUpload", DELETE: "s3:DeleteObject",
    LOOK: "s3:GetObject and s3:ListBucket",
}  # fmt: skip
_GCS = {
    PUT: "storage.objects.store.create", GET: "storage.objects.store.get", LIST: "storage.objects.store.list",
    CONDITIONAL: "storage.objects.store.create with ifGenerationMatch", COPY: "storage.objects.store.get and .create",
    DELETE: "storage.objects.store.delete", LOOK: "storage.objects.store.get and .list",
}  # fmt: skip
_AZURE = {
    PUT: "blobs/write", GET: "blobs/read", LIST: "blobs/read", CONDITIONAL: "blobs/add/action",
    COPY: "blobs/read and blobs/write", DELETE: "blobs/delete", LOOK: "blobs/read",
}  # fmt: skip
_RIGHTS: Mapping[str, Mapping[str, str]] = {
    "s3": _S3, "s3a": _S3, "gs": _GCS, "gcs": _GCS, "az": _AZURE, "abfs": _AZURE, "abfss": _AZURE,
}  # fmt: skip


def right(output: str, step: str) -> str:
    """What the store's operator calls the right that ``step`` needs at ``output``."""
    return _RIGHTS.get(protocol(output), {}).get(step, f"the right to {step}")


class OutputProbe:
    """One try below ``folder``, which is ``output``'s own and ends with a slash. Each step raises a
    :class:`RowmillError` when it is refused; all but :meth:`put` need what that one has put."""

    def __init__(self, store: ObjectStore, output: str, folder: str) -> None:
        self._store, self.folder = store, folder
        self.left: set[str] = set()
        """What the steps may have put and not deleted."""
        self._name = f"{folder}writable-{secrets.token_hex(4)}"
        self.steps: dict[str, Callable[[], None]] = {
            PUT: self.put,
            GET: self.get,
            LIST: self.list,
            CONDITIONAL: self.put_conditionally,
            COPY: self.copy,
        }
        if protocol(output) in ("s3", "s3a"):
            self.steps[PARTS] = self.upload_in_parts
        self.steps[DELETE] = self.delete

    def put(self) -> None:
        self._store.put_bytes(self._made(""), _CONTENT)

    def get(self) -> None:
        if self._store.read_bytes(self._name) != _CONTENT:
            raise RowmillError(f"{self._name} is not what was put there")

    def list(self) -> None:
        if self._name not in self._store.list_tree(self.folder):
            raise RowmillError(f"{self._name} was put, and a listing of its folder does not have it")

    def put_conditionally(self) -> None:
        """Put the same object once more, if there is none: that has to be refused, and for that reason alone."""
        try:
            self._store.put_bytes(self._name, _CONTENT, if_absent=True)
        except FileExistsError:
            return
        except (TypeError, NotImplementedError) as error:  # a client library that does not know of such puts
            raise RowmillError(f"cannot write {self._name}: {error}") from error
        raise RowmillError(f"{self._name} was replaced by a put that asked for no object to be there")

    def copy(self) -> None:
        self._store.publish(self._name, self._made("-copy"))

    def upload_in_parts(self) -> None:
        with tempfile.NamedTemporaryFile(prefix="rowmill-probe-") as file:
            file.truncate(2 * _PART_BYTES)
            self._store.upload(file.name, self._made("-parts"), part_bytes=_PART_BYTES)

    def delete(self) -> None:
        """Delete whatever the other steps have put."""
        self._store.delete_tree(self.folder, sorted(self.left))
        self.left.clear()

    def _made(self, suffix: str) -> str:
        self.left.add(self._name + suffix)
        return self._name + suffix


def require(store: ObjectStore, output: str, folder: str) -> None:
    """Raise :class:`InvalidJob`, naming the missing right, when no job could be published at ``output``.

    A few small requests: what a large file needs besides is left to ``rowmill doctor --output``.
    """
    probe = OutputProbe(store, output, folder)
    try:
        for step in (PUT, CONDITIONAL, GET, LIST):
            with refused(output, step):
                probe.steps[step]()
    except BaseException:
        with suppress(RowmillError):
            probe.delete()
        raise
    with refused(output, DELETE):
        probe.delete()


@contextmanager
def refused(output: str, step: str) -> Iterator[None]:
    """Say of an error in ``step`` which right it needs, and what to do. An error that may pass is raised unchanged."""
    try:
        yield
    except TransientError:
        raise
    except RowmillError as error:
        if step == LOOK and isinstance(error, InvalidJob) and not error.retry_on_other_worker:
            # No right would help: it is a file, or a place that nothing here can open.
            text = f"{_words(error)}; an output is a folder, here or in an object store: choose another one"
        else:
            text = f"{reason(output, step, error)}; {remedy(output, step, error)}"
        found = InvalidJob(text, field="output")
        found.retry_on_other_worker = error.retry_on_other_worker
        raise found from error


def reason(output: str, step: str, error: Exception) -> str:
    """Why ``step`` failed, in one line, and what it needs."""
    return f"{step} below {output} failed: {_words(error)} (it needs {right(output, needed(step, error))})"


def _words(error: Exception) -> str:
    return error.message if isinstance(error, InvalidJob) else str(error)


def needed(step: str, error: Exception) -> str:
    """The step whose right is missing: who puts an object also looks at it afterwards."""
    return GET if isinstance(error, InvalidInput) and step in (PUT, CONDITIONAL, COPY) else step


def remedy(output: str, step: str, error: Exception) -> str:
    """What to do about it."""
    if needed(step, error) == CONDITIONAL:
        return (
            "without conditional puts two jobs cannot be kept from writing to one output: allow them, or choose an "
            "output on a store that has them"
        )
    return f"allow it below {output}/, or choose another output"
