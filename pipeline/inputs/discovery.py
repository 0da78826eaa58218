"""What a job reads: its files, their rows and row groups, and one schema over all of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Protocol
from urllib.parse import unquote

import pyarrow as pa

from pipeline.inputs import row_groups, table_formats
from pipeline.inputs.convert import KEY_CHARS, Converter, key_of
from pipeline.inputs.disk_list import DiskBackedList
from pipeline.inputs.formats import Format, Kind, format_of, is_not_data_file
from pipeline.inputs.row_groups import InputFile
from pipeline.inputs.schema import UnifiedSchema
from pipeline.spec.text_options import TextOptions, TextSpec
from storage import locations
from storage.errors import InvalidInput
from storage.logs import pool_with_ids
from storage.objects import listing
from storage.objects.store import ObjectInfo, ObjectStore
from storage.parquet import parquet
from storage.parquet.arrow_schemas import Path
from storage.parquet.values import value_range
from storage.records import Source

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
"""How Hive spells null in a folder's name."""
_READERS = 8
_AHEAD = 128
"""Footers that are read ahead of the one being looked at."""
_MOST_LOOKED_AT = 1_000
"""Files whose footers are read before a job is stored for others to plan."""
_MOST_CONVERTED, _COMPRESSED = 32 * 2**20, 16
"""Bytes of text that are converted for it, and how much more compressed ones may be."""
_NAMED = 3
"""Files that a message names before it counts the others."""
_INT = re.compile(r"0|-?[1-9][0-9]*")
_NOT_ASKED_FOR = "it was not converted, because the job names it nowhere: name it in keep_columns (--keep)"


class InputSpec(TextSpec, Protocol):
    """The part of a job's specification that says where its rows come from and go to, with normalized locations."""

    @property
    def input(self) -> tuple[str, ...]: ...
    @property
    def output(self) -> str: ...
    @property
    def wanted_columns(self) -> frozenset[str] | None: ...


@dataclass(frozen=True, slots=True)
class Inputs:
    """``sources`` in row order; ``files`` are their row groups, for planning; ``schema`` covers all of them.

    ``originals`` are URI and etag of every file that was read, before any was converted. ``unreadable`` says, by the
    name of a column that nobody can read, where and why; ``clashes``, why its types do not go together. ``files`` may
    leave out rows, and whole sources.
    Sources and row groups lie on disk, so that planning takes only the memory of the files' names.
    """

    sources: DiskBackedList[Source]
    files: DiskBackedList[InputFile]
    schema: pa.Schema
    originals: list[tuple[str, str]]
    unreadable: Mapping[str, str] = field(default_factory=dict)
    clashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that are to be computed: those of ``files``."""
        return sum(file.rows for file in self.files)

    def narrowed(self, *, limit: int | None, sample: int | None) -> Inputs:
        """The first ``limit`` rows, or ``sample`` rows spread evenly over all; the sources stay what they are."""
        if limit is None and sample is None:
            return self
        ranges = [(0, limit)] if limit is not None else row_groups.sample_ranges(self.rows, sample or 0)
        return replace(self, files=DiskBackedList(row_groups.select(self.files, ranges)))


Processed = Callable[[Sequence[str]], set[tuple[str, str]]]
"""URIs → the (URI, etag) among them that need not be read again."""


@dataclass(frozen=True, slots=True)
class _File:
    """A Parquet file to read; ``origin`` is what the user calls it."""

    info: ObjectInfo
    origin: str
    partition: dict[str, str | None] = field(default_factory=dict)
    converted: bool = False


def new_files(store: ObjectStore, spec: InputSpec, done: Processed) -> list[ObjectInfo]:
    """The files of the input whose present version ``done`` does not name; possibly none."""
    return _without(done, _files(store, spec))


def _files(store: ObjectStore, spec: InputSpec) -> list[ObjectInfo]:
    return [info for pattern in spec.input for info in _listed(store, pattern, lambda _: None)[0]]


def _without(done: Processed | None, infos: Sequence[ObjectInfo]) -> list[ObjectInfo]:
    seen = set() if done is None else done([info.uri for info in infos])
    return [info for info in infos if (info.uri, info.etag) not in seen]


def discover(
    store: ObjectStore,
    spec: InputSpec,
    work_dir_uri: str,
    notify: Callable[[str], None] = lambda message: None,
    done: Processed | None = None,
) -> Inputs:
    """Find the input, turn what is not Parquet into Parquet below ``work_dir_uri``, and read all footers.

    Files come in the order of ``spec.input``, sorted by name within each. Hive folders (``k=v``) below a directory or
    from a glob's first wildcard on become columns at the end, unless the files have them. ``notify`` hears of files
    that were passed over. With ``done``, the files that it names are left out, and a pattern may match nothing. Raises
    :class:`InvalidInput`, naming the file and the reason; nothing but chunks in the work folder is ever written.
    """
    return _read(store, spec, _found(store, spec, notify, done), work_dir_uri)


def look(
    store: ObjectStore, spec: InputSpec, folder: str, notify: Callable[[str], None] = lambda message: None
) -> Inputs | None:
    """What :func:`discover` would find, with chunks in ``folder``; ``None``, and a notice, where that takes long: for
    many files, or much that is not Parquet. Raises :class:`InvalidInput` as :func:`discover` does."""
    found = _found(store, spec, notify, None)
    if len(found) > _MOST_LOOKED_AT:
        notify(f"the input has {len(found):,} files: the worker that plans the job reads their columns")
        return None
    weights = {None: 1, "gzip": _COMPRESSED, "zstd": _COMPRESSED}
    n_bytes = sum(
        file.info.n_bytes * weights[kind.compression] for file, kind in found if kind.kind is not Kind.PARQUET
    )
    if n_bytes > _MOST_CONVERTED:
        notify("the input is large and not Parquet: the worker that plans the job reads its columns")
        return None
    return _read(store, spec, found, folder)


def _read(store: ObjectStore, spec: InputSpec, found: Sequence[tuple[_File, Format]], work_dir_uri: str) -> Inputs:
    unified = UnifiedSchema()
    converter = Converter(store, TextOptions.of(spec, spec.wanted_columns), work_dir_uri)
    files = list(_parquet_files(store, found, converter))
    sources: DiskBackedList[Source] = DiskBackedList()
    groups: DiskBackedList[InputFile] = DiskBackedList()
    unreadable = dict(converter.unreadable)
    for idx, (file, stats) in enumerate(zip(files, _footers(store, files), strict=True)):
        unified.add(stats.schema, file.origin, stats.orders)
        for name, why in stats.unreadable.items():
            unreadable.setdefault(name, f"{file.origin} ({why})")
        sources.append(Source(idx, file.info.uri, file.info.etag, file.info.n_bytes, stats.n_rows, file.partition))
        groups.append(InputFile(idx, stats.row_groups))
    for name, origin in unified.twice.items():
        unreadable.setdefault(name, f"{origin} (two columns have that name)")
    left_out = [item for item in converter.left_out if item.name not in unified]
    for item in left_out:
        unreadable.setdefault(item.name, _NOT_ASKED_FOR)
    keys = dict.fromkeys(key for file in files for key in file.partition if key not in unified)
    if any(key not in keys for file in files for key in file.partition):
        sources = DiskBackedList(
            replace(s, partition={k: v for k, v in s.partition.items() if k in keys}) for s in sources
        )
    fields = [*unified.resolved(partial(_range_of, store, files)), *left_out]
    fields = [_typed(item) for item in fields] if any(file.converted for file in files) else fields
    partition = [pa.field(key, _partition_type(key, sources)) for key in keys]
    schema = pa.schema([*fields, *partition], metadata=unified.metadata)
    if not schema.names:
        if any(source.n_rows for source in sources):
            raise InvalidInput("the input has rows and no columns", field="input")
        raise InvalidInput(f"{found[0][0].origin} is empty: without rows it has no columns either", field="input")
    originals = [(file.info.uri, file.info.etag) for file, _ in found]
    return Inputs(sources, groups, schema, originals, unreadable, unified.clashes)


def _range_of(store: ObjectStore, files: Sequence[_File], path: Path) -> tuple[int, int] | None:
    """Of the values at ``path``, over all files; read from their footers where those say."""
    with pool_with_ids(_READERS, "rowmill-ranges") as pool:
        found = [each for each in pool.map(lambda file: value_range(store, file.info.uri, path), files) if each]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


def _typed(item: pa.Field[pa.DataType]) -> pa.Field[pa.DataType]:
    """A CSV or JSONL column without any value has no type of its own: it is text."""
    return item.with_type(pa.string()) if pa.types.is_null(item.type) else item


def _footers(store: ObjectStore, files: Sequence[_File]) -> Iterator[parquet.FileStats]:
    with pool_with_ids(_READERS, "rowmill-footers") as pool:
        for start in range(0, len(files), _AHEAD):
            yield from pool.map(
                lambda file: parquet.stats(store, file.info.uri, check=not file.converted),
                files[start : start + _AHEAD],
            )


def _parquet_files(store: ObjectStore, found: Sequence[tuple[_File, Format]], converter: Converter) -> Iterator[_File]:
    converter.survey((file.info, kind) for file, kind in found)
    number = 0
    for file, kind in found:
        if kind.kind is Kind.PARQUET:
            yield file
            continue
        for uri in converter.convert(file.info, kind, number):
            number += 1
            yield _File(store.info(uri), file.origin, file.partition, converted=True)


def convert_again(
    store: ObjectStore, spec: InputSpec, work_dir_uri: str, chunks: Sequence[str], missing: Collection[str]
) -> None:
    """Write those of ``chunks`` again that are ``missing``, with the rows they had.

    ``chunks`` are all that :func:`discover` made below ``work_dir_uri``, in order. Newer files of the input are passed
    over. Raises :class:`InvalidInput` when a file that missing chunks were made of is gone or was changed.
    """
    keys = {locations.chunk_key(uri)[:KEY_CHARS] for uri in chunks}
    files = []
    for pattern in spec.input:
        infos, table = _listed(store, pattern, lambda _: None)
        files += [(info, table or format_of(store, info.uri)) for info in infos if key_of(info) in keys]
    converter = Converter(store, TextOptions.of(spec, spec.wanted_columns), work_dir_uri)
    converter.survey(files)
    made: set[str] = set()
    for info, kind in files:
        mine = [uri for uri in chunks if locations.chunk_key(uri)[:KEY_CHARS] == key_of(info)]
        if not made.issuperset(mine) and not set(missing).isdisjoint(mine):
            made.update(converter.convert(info, kind, chunks.index(mine[0])))
    if not made.issuperset(missing):
        raise InvalidInput(
            "rows that are still to be computed were read from a file that is gone, or was changed since the job was "
            f"planned ({', '.join(spec.input)}); put it back as it was, or submit a new job",
            field="input",
        )


def _found(
    store: ObjectStore, spec: InputSpec, notify: Callable[[str], None], done: Processed | None
) -> list[tuple[_File, Format]]:
    found: list[tuple[_File, Format]] = []
    by: dict[str, str] = {}
    shared = _shared_folder(spec.input)
    for pattern in spec.input:
        refuse_output_inside(pattern, spec.output)
        try:
            data, table = _listed(store, pattern, notify)
        except InvalidInput as error:
            raise InvalidInput(error.message, field=error.field or "input") from error
        if not data and done is None:
            raise InvalidInput(
                f"no file matches {pattern} (names that begin with '.' or '_' are not read){_about_brackets(pattern)}",
                field="input",
            )
        data = _without(done, data)
        here: dict[Kind, str] = {}
        for info in data:
            own = (locations.data_dir(spec.output), f"{spec.output}/{locations.WORK_FOLDER}")
            if any(_is_within(info.uri, folder) for folder in own):
                raise InvalidInput(f"{info.uri} lies where the output goes ({spec.output})", field="input")
            if info.uri in by:
                raise InvalidInput(f"{info.uri} is in the input twice: {by[info.uri]} and {pattern}", field="input")
            by[info.uri] = pattern
            kind = table or format_of(store, info.uri)
            here.setdefault(kind.kind, info.uri)
            found.append((_File(info, info.uri, _partition_of(info.uri, pattern, shared)), kind))
        if len(here) > 1:
            (one, first), (other, second) = list(here.items())[:2]
            raise InvalidInput(
                f"{pattern} mixes formats: {first} is {one}, {second} is {other}; give one format at a time",
                field="input",
            )
    if not found:
        raise InvalidInput("no file is new since the schedule's last completed fire", field="input")
    return found


def fingerprint(files: Iterable[tuple[str, str]]) -> str:
    """A hex digest of the URI and etag of every file, whatever their order."""
    digest = hashlib.sha256()
    for uri, etag in sorted(files):
        digest.update(f"{uri}\0{etag}\0".encode())
    return digest.hexdigest()


def fingerprint_now(store: ObjectStore, spec: InputSpec) -> str:
    """:func:`fingerprint` of the input's present files. Raises :class:`InvalidInput` where there are none."""
    return fingerprint((info.uri, info.etag) for info in _files(store, spec))


def _listed(
    store: ObjectStore, pattern: str, notify: Callable[[str], None]
) -> tuple[Sequence[ObjectInfo], Format | None]:
    """The files that a pattern stands for; or the one table that it is, with its format."""
    kind = None if listing.is_glob(pattern) else table_formats.kind_at(store, pattern)
    if kind is not None:
        return [table_formats.current(pattern, kind)], Format(kind)
    infos = store.find(pattern)
    table_formats.refuse_files_of(store, (info.uri for info in infos), pattern)
    return _data_files(store, infos, pattern, notify), None


def _data_files(
    store: ObjectStore, infos: Sequence[ObjectInfo], pattern: str, notify: Callable[[str], None]
) -> Sequence[ObjectInfo]:
    """Without what is evidently no data, such as a ``readme.txt``, unless that is all there is or asked for by name."""
    passed = [info.uri for info in infos if info.uri != pattern and is_not_data_file(store, info.uri)]
    if not passed or len(passed) == len(infos):
        return infos
    known = frozenset(passed)
    data = [info for info in infos if info.uri not in known]
    more = f" and {len(passed) - _NAMED} more" if len(passed) > _NAMED else ""
    notify(f"passed over in {pattern}, by their names no data: {', '.join(passed[:_NAMED])}{more}")
    return data


def refuse_output_inside(pattern: str, output: str) -> None:
    """A job must not find its own output when its input is listed again, nor another job this one's.

    Raises :class:`InvalidInput`; both locations are normalized ones.
    """
    example = locations.part(output, 0)
    inside = _is_within(output, pattern)
    if not inside and listing.is_glob(pattern):
        # A glob may match a folder, which then stands for all below it.
        parts = example.split("/")
        inside = any(listing.matches(pattern, "/".join(parts[:n])) for n in range(1, len(parts) + 1))
    if inside:
        raise InvalidInput(
            f"the output {output} lies inside the input {pattern}: it would be read as input the next time",
            field="input",
        )


def _is_within(path: str, folder: str) -> bool:
    path, folder = _resolved(path), _resolved(folder)
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _resolved(uri: str) -> str:
    return os.path.realpath(uri) if locations.protocol(uri) == "file" else uri


def _about_brackets(pattern: str) -> str:
    if "[" not in pattern:
        return ""
    return (
        "; in a pattern, brackets stand for one character of those inside them: for a name with brackets write "
        f"{listing.literal_brackets(pattern)}"
    )


def _shared_folder(patterns: Sequence[str]) -> str | None:
    """The folder that all those have in common which are no globs; ``None`` for fewer than two."""
    named = [pattern.split("/")[:-1] for pattern in patterns if not listing.is_glob(pattern)]
    if len(named) < 2:
        return None
    return "/".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*named, strict=False)))


def _partition_of(uri: str, pattern: str, shared: str | None) -> dict[str, str | None]:
    """The hive keys in the folders between what was asked for and the file.

    Where several files or folders were named (``shared``: their common folder), the shell may have made them of a
    glob. Then the keys in their own paths count too: those below ``shared``, and those directly above the file.
    """
    root = pattern if uri == pattern or uri.startswith(pattern + "/") else listing.literal_prefix(pattern)
    if root == pattern and shared is not None:
        folders = pattern.split("/")
        if uri == pattern:
            folders.pop()
        while folders and folders[-1].find("=") > 0:
            folders.pop()
        root = min("/".join(folders), shared, key=len)
    found: dict[str, str | None] = {}
    for name in uri[len(root) :].strip("/").split("/")[:-1]:
        key, equals, value = name.partition("=")
        if equals and key:
            found[unquote(key)] = None if value == HIVE_NULL else unquote(value)
    return found


def _partition_type(key: str, sources: Iterable[Source]) -> pa.DataType:
    """``int32`` where every value is one and is written as one (no ``01``), text otherwise."""
    values = {value for source in sources if (value := source.partition.get(key)) is not None}
    if values and all(_INT.fullmatch(value) and -(2**31) <= int(value) < 2**31 for value in values):
        return pa.int32()
    return pa.string()
