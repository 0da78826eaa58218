"""Folders that are tables of Delta Lake, Apache Iceberg or Apache Hudi: their logs say which files in them count.

Delta and Iceberg are read through their own libraries, at the snapshot that is current when the job is planned.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.inputs.formats import Kind
from storage.errors import InvalidInput
from storage.locations import protocol
from storage.objects import listing
from storage.objects.store import ObjectInfo, ObjectStore

_MARKS = {Kind.DELTA: "_delta_log", Kind.ICEBERG: "metadata/*.metadata.json", Kind.HUDI: ".hoodie"}
"""What tells the kind of a table, in its folder."""
_LIBRARIES = {Kind.DELTA: ("deltalake", "delta"), Kind.ICEBERG: ("pyiceberg.table", "iceberg")}
"""Module and extra that read a kind of table."""
_VERSION = re.compile(r"v?(\d+)(-.*)?\.(gz\.)?metadata\.json")


def kind_at(store: ObjectStore, folder: str) -> Kind | None:
    """The kind of table that a folder is, or ``None``."""
    for kind, mark in _MARKS.items():
        if protocol(folder) == "file":
            literal, found = Path(folder), False
            with suppress(OSError):  # a name too long, a ring of links: told by whoever looks for the input's files
                found = any(literal.glob(mark)) if listing.is_glob(mark) else (literal / mark).is_dir()
        else:
            found = bool(store.find(f"{folder}/{mark}"))
        if found:
            return kind
    return None


def current(uri: str, kind: Kind) -> ObjectInfo:
    """The table as one object, whose etag names its current snapshot. Reads nothing but its log.

    Raises :class:`InvalidInput` for a table that is not read here.
    """
    if kind is Kind.HUDI:
        raise _refusal(uri, kind, "which is not read; write its current snapshot as Parquet")
    if protocol(uri) != "file":
        raise _refusal(uri, kind, "which is read from local folders only; copy it, or write its snapshot as Parquet")
    if kind is Kind.DELTA:
        table = _delta(uri, None)
        with _readable(uri, kind):
            sizes = pa.table(table.get_add_actions(flatten=True)).column("size_bytes").to_pylist()
            return ObjectInfo(uri, sum(size or 0 for size in sizes), str(table.version()))
    name = _newest_metadata(uri)
    with _readable(uri, kind):
        tasks = list(_iceberg(uri, name).scan().plan_files())
    return ObjectInfo(uri, sum(task.file.file_size_in_bytes for task in tasks), name)


def tables(uri: str, etag: str, kind: Kind) -> Iterator[pa.Table]:
    """The rows of the snapshot that ``etag`` names, file after file; at least one table, if an empty one."""
    with _readable(uri, kind):
        batches = _delta_batches(uri, int(etag)) if kind is Kind.DELTA else _iceberg_batches(uri, etag)
        schema = next(batches)
    yield schema.empty_table()
    while True:
        with _readable(uri, kind):
            batch = next(batches, None)
        if batch is None:
            return
        yield pa.Table.from_batches([batch]).cast(schema)


def refuse_files_of(store: ObjectStore, uris: Iterable[str], pattern: str) -> None:
    """Raise :class:`InvalidInput` where files of a table were found one by one, without its log."""
    root = listing.literal_prefix(pattern) if listing.is_glob(pattern) else pattern
    folders: dict[str, None] = {}
    if protocol(pattern) == "file":
        for uri in uris:
            folder = os.path.dirname(uri)  # noqa: PTH120
            while folder not in folders and folder.strip("/"):
                folders[folder] = None
                name = os.path.basename(folder)  # noqa: PTH119
                if len(folder) <= len(root) and "=" not in name and name != "data":
                    break
                folder = os.path.dirname(folder)  # noqa: PTH120
    elif root != pattern:
        folders[root] = None
    for folder in folders:
        kind = kind_at(store, folder)
        if kind is not None:
            raise _refusal(folder, kind, "and files in it may no longer be part of it; give the folder itself")


def _refusal(uri: str, kind: Kind, why: str) -> InvalidInput:
    return InvalidInput(f"{uri} is a table of {kind}, {why}", field="input")


@contextmanager
def _readable(uri: str, kind: Kind) -> Iterator[None]:
    """The library's errors as :class:`InvalidInput`."""
    try:
        yield
    except InvalidInput:
        raise
    except Exception as error:  # the libraries have no common class of errors
        reason = str(error).partition("\n")[0]
        raise InvalidInput(
            f"{uri} is a table of {kind} that cannot be read: {reason or type(error).__name__}", field="input"
        ) from error


def _library(uri: str, kind: Kind) -> Any:
    name, extra = _LIBRARIES[kind]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _refusal(uri, kind, f"which needs another package: pip install 'rowmill[{extra}]'") from error


def _delta(uri: str, version: int | None) -> Any:
    library = _library(uri, Kind.DELTA)
    with _readable(uri, Kind.DELTA):
        table = library.DeltaTable(uri, version=version)
        mapping = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mapping != "none":
        # The library would look for the columns under names that the files do not have.
        raise _refusal(uri, Kind.DELTA, "with renamed columns (columnMapping), which are not read; write it as Parquet")
    return table


def _delta_batches(uri: str, version: int) -> Iterator[Any]:
    """The schema, then the batches."""
    dataset = _delta(uri, version).to_pyarrow_dataset()
    yield dataset.schema
    for fragment in sorted(dataset.get_fragments(), key=lambda fragment: str(fragment.path)):
        yield from fragment.to_batches(schema=dataset.schema)


def _newest_metadata(uri: str) -> str:
    """The name of the newest metadata file. Raises :class:`InvalidInput` where two claim to be it."""
    numbers: dict[str, int] = {}
    for path in (Path(uri) / "metadata").iterdir():
        if (match := _VERSION.fullmatch(path.name)) is not None:
            numbers[path.name] = int(match[1])
    newest = [name for name, number in numbers.items() if number == max(numbers.values())]
    if len(newest) != 1:
        raise _refusal(
            uri,
            Kind.ICEBERG,
            f"whose current snapshot only its catalog knows ({len(newest)} newest metadata files); write it as Parquet",
        )
    return newest[0]


def _iceberg(uri: str, name: str) -> Any:
    library = _library(uri, Kind.ICEBERG)
    return library.StaticTable.from_metadata(f"{uri}/metadata/{name}")


def _iceberg_batches(uri: str, name: str) -> Iterator[Any]:
    """The schema, then the batches."""
    from pyiceberg.io.pyarrow import ArrowScan, schema_to_pyarrow

    table = _iceberg(uri, name)
    scan = table.scan()
    projection = scan.projection()
    yield schema_to_pyarrow(projection, include_field_ids=False)
    tasks = sorted(scan.plan_files(), key=lambda task: str(task.file.file_path))
    reader = ArrowScan(table.metadata, table.io, projection, scan.row_filter, scan.case_sensitive, scan.limit)
    for task in tasks:
        yield from reader.to_record_batches([task])
