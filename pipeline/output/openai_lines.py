"""The responses of a published job as the lines of OpenAI's batch API, beside its Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from pipeline.engines.arrow_text import values
from pipeline.requests.lines import line_of
from pipeline.spec.request_fields import CUSTOM_ID
from pipeline.spec.result_columns import ERROR_COLUMN
from storage import locations
from storage.objects.new_file import NewFile
from storage.objects.store import ObjectStore
from storage.parquet import parquet
from storage.records import Job

_BATCH_ROWS = 512
"""Rows in memory: responses may be long."""


def write(store: ObjectStore, job: Job, entries: Sequence[Mapping[str, Any]], prefix: str) -> None:
    """Write ``openai/output.jsonl`` and ``openai/errors.jsonl``, in the order of the rows, from the published parts.

    ``entries``: those of the manifest, in order. A row is in one of the two, once; a file without lines is not written.
    """
    with ExitStack() as stack:
        files: dict[bool, NewFile] = {}
        for row in _rows(store, job.output_uri, entries, prefix):
            answered, line = line_of(job.id, row, prefix)
            if answered not in files:
                uri = locations.openai_lines(job.output_uri, failed=not answered)
                files[answered] = stack.enter_context(store.create(uri))
            files[answered].write(line)


def _rows(
    store: ObjectStore, output: str, entries: Sequence[Mapping[str, Any]], prefix: str
) -> Iterator[dict[str, Any]]:
    names = [CUSTOM_ID, f"{prefix}response", ERROR_COLUMN]
    for entry in entries:
        for batch in parquet.columns(store, f"{output.rstrip('/')}/{entry['path']}", names, _BATCH_ROWS):
            columns = [values(batch.column(name)) for name in names]
            for row in zip(*columns, strict=True):
                yield dict(zip(names, row, strict=True))
