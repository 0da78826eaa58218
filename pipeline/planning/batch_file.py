"""Batch files of OpenAI's API as an input: recognised by their first line, and checked whole before a row is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.inputs import compressed, json_array
from pipeline.inputs.formats import Format, Kind, format_of
from pipeline.requests import envelope
from pipeline.requests.envelope import LINE_BYTES, Report
from pipeline.requests.job import endpoint_of
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.request_fields import TASK_OF
from pipeline.spec.text_options import encoding_name
from storage.errors import InvalidInput, InvalidJob, RowmillError
from storage.locations import normalize
from storage.objects.store import ObjectStore
from storage.parquet.batches import readable

BODY = "body"
_SAYS_WHAT_TO_DO = (
    *("request_column", "prompt", "prompt_token_column", "messages", "column", "pair_column", "inputs"),
    *("image_column", "audio_column", "video_column"),
)
_SHOWN = 5


def recognised(store: ObjectStore, fields: Mapping[str, Any], notify: Callable[[str], None]) -> dict[str, Any]:
    """The fields of a request for a job; with ``request_column`` and ``endpoint``, where they do not say what to read
    and the first line of the input is that of a batch file.

    An input that cannot be read is left to whoever reads it. Raises :class:`InvalidInput` for a line with an endpoint
    that there is not.
    """
    found = dict(fields)
    if any(fields.get(name) not in (None, {}, ()) for name in _SAYS_WHAT_TO_DO):
        return found
    if fields.get("task") not in (None, *TASK_OF.values()):
        return found
    line = None
    with suppress(RowmillError, OSError, TypeError, ValueError, IndexError, KeyError):
        given = fields["input"]
        line = _first(store, given if isinstance(given, str) else given[0], fields.get("encoding"))
    if line is None:
        if fields.get("task") is None and fields.get("endpoint") is None:
            raise InvalidJob(
                "say what to compute (-t/--task), such as generate, chat or embed; only a batch file of OpenAI's API "
                "says it itself",
                field="task",
            )
        return found
    url = line["url"]
    if url not in TASK_OF:
        what = f"the first line is a request to {str(url)[:100]!r}; there are {', '.join(TASK_OF)}"
        raise InvalidInput(what, field="input")
    if fields.get("task") not in (None, TASK_OF[url]):
        what = f"the first line is a request to {url}, which task '{TASK_OF[url]}' answers; leave task out"
        raise InvalidInput(what, field="task")
    notify(f"the input is a batch file of requests to {url}: they are the column {BODY!r}")
    return found | {"request_column": BODY, "endpoint": url, "task": TASK_OF[url]}


def check(store: ObjectStore, spec: JobSpec, uris: Iterable[str]) -> None:
    """Check the envelopes of those of the input's files that are batch files, where the job answers their requests.

    Raises :class:`InvalidInput` with the lines at fault.
    """
    if spec.request_column != BODY:
        return
    for uri in uris:
        kind = format_of(store, uri)
        if kind.kind is not Kind.JSONL or _first_line(store, uri, kind, spec.encoding) is None:
            continue
        with _lines(store, uri, kind, spec.encoding) as lines:
            report = envelope.scan(lines, endpoint=endpoint_of(spec))
        if report.n_faults:
            raise InvalidInput(f"{uri} is not a valid batch file: {_described(report)}", field="input")


def _described(report: Report) -> str:
    shown = [f"line {each.line}: {each.message} ({each.code})" for each in report.faults[:_SHOWN]]
    more = f"; and {report.n_faults - _SHOWN:,} more" if report.n_faults > _SHOWN else ""
    return "; ".join(shown) + more


def _first(store: ObjectStore, pattern: str, encoding: str | None) -> Mapping[str, Any] | None:
    infos = store.find(normalize(pattern))
    kind = format_of(store, infos[0].uri)
    return _first_line(store, infos[0].uri, kind, encoding) if kind.kind is Kind.JSONL else None


def _first_line(store: ObjectStore, uri: str, kind: Format, encoding: str | None) -> Mapping[str, Any] | None:
    with _lines(store, uri, kind, encoding) as lines:
        _, line = next(lines, (0, None))
    return None if line is None else envelope.read_envelope(line)


@contextmanager
def _lines(
    store: ObjectStore, uri: str, kind: Format, encoding: str | None
) -> Iterator[Iterator[tuple[int, bytes | None]]]:
    name = None if encoding is None else encoding_name(encoding)
    with (
        readable(uri, InvalidInput, "it cannot be decompressed"),
        compressed.opened(store, uri, kind.compression, name) as opened,
    ):
        yield envelope.physical_lines(json_array.as_lines(opened, uri, LINE_BYTES))
