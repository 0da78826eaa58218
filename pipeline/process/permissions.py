"""What the operator allows beyond a job's own input and model: files that rows name, directories of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.settings import Settings
from pipeline.engines.base import Permissions
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidInput, RowmillError, TransientError
from storage.locations import normalize, protocol
from storage.objects.store import ObjectStore

MAX_FILE_BYTES = 64 * 2**20
"""Largest file read because a row names it."""


class RowFiles:
    """Reads files that rows name, below the operator's prefixes (the setting ``uri_prefixes``)."""

    def __init__(self, store: ObjectStore, prefixes: Sequence[str]) -> None:
        self._store = store
        self._prefixes = tuple(normalize(prefix) for prefix in prefixes)

    def __call__(self, uri: str) -> bytes:
        """The file's content. Raises :class:`~storage.errors.InvalidInput` when it is not allowed, not there, too large
        or not readable, and :class:`~storage.errors.Unreachable` when the store does not answer."""
        try:
            return self._read(uri)
        except (InvalidInput, TransientError):
            raise
        # A row can name anything: a name with a null byte or of a megabyte, a loop of links, a pipe.
        except (RowmillError, OSError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"{uri[:200]} cannot be read: {error}") from error

    def _read(self, uri: str) -> bytes:
        path = self._allowed(uri)
        size = self._store.info(path).n_bytes
        if size > MAX_FILE_BYTES:
            raise InvalidInput(f"{uri} has {size} bytes; at most {MAX_FILE_BYTES} are read for a row")
        return self._store.read_bytes(path)

    def _allowed(self, uri: str) -> str:
        if not self._prefixes:
            raise InvalidInput(f"{uri} is not read: the operator's setting uri_prefixes allows no place")
        if protocol(normalize(uri)) in ("http", "https"):
            raise InvalidInput(f"{uri} is not read: rows may not name web addresses")
        path = inside(uri, self._prefixes)
        if path is None:
            raise InvalidInput(f"{uri} lies outside the places that the operator's setting uri_prefixes allows")
        return path


def inside(uri: str, prefixes: Sequence[str]) -> str | None:
    """``uri`` made absolute, its links followed, where it lies below one of the normalized ``prefixes``.

    Raises :class:`~storage.errors.InvalidJob` for a chained URL.
    """
    path = normalize(uri)
    if protocol(path) == "file":
        # Links are followed first: the check is on the file that would be read.
        real = Path(path).resolve()
        below = (protocol(prefix) == "file" and real.is_relative_to(Path(prefix).resolve()) for prefix in prefixes)
        return str(real) if any(below) else None
    steps = ".." in path.split("/")
    below = (path == prefix or path.startswith(prefix + "/") for prefix in prefixes)
    return path if not steps and any(below) else None


def granted(settings: Settings) -> Permissions:
    """What the settings allow the jobs of this process."""
    return Permissions(
        engine_options=frozenset(settings.allowed_engine_options),
        custom_op_paths=settings.custom_op_paths,
        own_machine=settings.broker_url is None,
    )


def check_adapters(spec: JobSpec, permissions: Permissions) -> None:
    """Refuse a job that names directories of a fleet's workers, unless the operator allows it.

    Raises :class:`~storage.errors.InvalidJob`.
    """
    if spec.adapters and not permissions.own_machine:
        permissions.require("adapters", "they name directories of the worker", field="adapters")
