"""What lies at a job's output location: is it free, and where does a committed file stand now."""

from __future__ import annotations

from dataclasses import replace

from storage import locations
from storage.errors import Conflict
from storage.objects import ObjectStore
from storage.records import PartFile


def refuse_existing(store: ObjectStore, output: str) -> None:
    """Raise :class:`Conflict` when ``output`` holds published rows, whoever published them."""
    if not is_free(store, output):
        raise Conflict(
            f"{output} already holds published rows; choose another output, or pass --overwrite (overwrite=True) "
            "to replace them when the new job ends",
            field="output",
        )


def is_free(store: ObjectStore, output: str) -> bool:
    """Whether nobody has published anything at ``output``."""
    marks = (locations.success(output), locations.manifest(output))
    return not any(store.exists(mark) for mark in marks) and not store.find(f"{locations.data_dir(output)}/*.parquet")


def published(store: ObjectStore, output: str, idx: int, file: PartFile | None) -> PartFile | None:
    """The same committed file at the place where it can be read now: once published, its attempt's copy may be gone."""
    if file is None or store.exists(file.uri):
        return file
    return replace(file, uri=locations.part(output, idx))
