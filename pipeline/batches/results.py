"""What a batch wrote: each line of its input as a line of the output file or of the error file, once, in order."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from pipeline.batches import places
from pipeline.engines.arrow_text import values
from pipeline.process.runtime import Runtime
from pipeline.requests import envelope
from pipeline.requests.lines import error_line, line_of
from pipeline.spec.request_fields import CUSTOM_ID
from pipeline.spec.result_columns import COUNTS, ERROR_COLUMN
from storage import locations
from storage.files.records import Batch, File, NewFile
from storage.objects.new_file import NewFile as Writing
from storage.parquet import parquet
from storage.records import Job

_BATCH_ROWS = 512
"""Rows in memory: responses may be long."""
_NUMBER = re.compile(r"(\d+)\.parquet$")


@dataclass(slots=True)
class Written:
    """The two files of a batch, ``None`` for one without a line, and the sums over all lines."""

    output: NewFile | None = None
    errors: NewFile | None = None
    n_completed: int = 0
    n_failed: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))


def write(runtime: Runtime, batch: Batch, file: File, job: Job | None, *, missing: tuple[str, str]) -> Written:
    """Write the lines of a batch from what its job published. ``missing``: code and message of the lines without a
    result. Run again, it writes the same."""
    settings, store = runtime.settings, runtime.store
    found = Written()
    with ExitStack() as stack:
        rows = stack.enter_context(closing(_rows(runtime, job)))
        open_files: dict[bool, tuple[str, Writing]] = {}

        def put(line: bytes, *, failed: bool) -> None:
            if failed not in open_files:
                file_id = places.output_file_id(batch.id, failed=failed)
                writing = stack.enter_context(store.stream(places.file_uri(settings, file_id)))
                open_files[failed] = (file_id, writing)
            open_files[failed][1].write(line)

        row = next(rows, None)
        for name in _names(runtime, file):
            if row is None or row[CUSTOM_ID] != name:
                put(error_line(batch.id, name, *missing), failed=True)
                found.n_failed += 1
                continue
            answered, line = line_of(batch.id, row)
            put(line, failed=not answered)
            if answered:
                found.n_completed += 1
                for count in COUNTS:
                    found.tokens[count] += row.get(count) or 0
            else:
                found.n_failed += 1
            row = next(rows, None)
        for failed, (file_id, writing) in open_files.items():
            new = NewFile(file_id, f"{batch.id}_{'error' if failed else 'output'}.jsonl", writing.uri, writing.tell())
            if failed:
                found.errors = new
            else:
                found.output = new
    return found


def _names(runtime: Runtime, file: File) -> Iterator[str]:
    """The ``custom_id`` of each line of a file that was found valid, in order."""
    with runtime.store.open(file.uri) as stream:
        for _, line in envelope.physical_lines(stream, runtime.settings.max_line_bytes):
            assert line is not None
            yield json.loads(line)[CUSTOM_ID]


def _rows(runtime: Runtime, job: Job | None) -> Generator[dict[str, Any]]:
    """The published rows of a job, in order; none where nothing was published."""
    if job is None:
        return
    store = runtime.store
    parts = store.find(f"{locations.data_dir(job.output_uri)}/*.parquet")
    for part in sorted(parts, key=lambda item: int(_NUMBER.findall(item.uri)[0])):
        with store.open(part.uri) as stream:
            there = set(pq.read_schema(stream).names)
        wanted = [CUSTOM_ID, ERROR_COLUMN, "response", *COUNTS]
        names = [name for name in wanted if name in there]
        for batch in parquet.columns(store, part.uri, names, _BATCH_ROWS):
            columns = [values(batch.column(name)) for name in names]
            for row in zip(*columns, strict=True):
                yield dict(zip(names, row, strict=True))
