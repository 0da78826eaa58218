"""The lines of a batch file, ``{custom_id, method, url, body}``: read, recognised and checked. Pure.

A fault of the envelope fails the whole file. Any other fault inside ``body`` is its request's own, and is found when
the request is answered (:mod:`pipeline.requests.body`).
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from pipeline.requests.body import PROMPT_OF
from pipeline.spec import json_text
from pipeline.spec.request_fields import TASK_OF
from pipeline.spec.values import plain_text

LINE_BYTES = 256 * 2**20
"""Longest line, unless the caller says another length."""
MOST_ERRORS = 1_000
"""Faults that are kept; the others are counted."""
_FIELDS = ("custom_id", "method", "url", "body")
_BLOCK = 2**20
_DIGITS = 400
_NAMES = 1024


class FaultCode(StrEnum):
    """What can be wrong with a batch file: OpenAI's codes, and those of the gateway."""

    INVALID_JSON_LINE = "invalid_json_line"
    MISSING_REQUIRED_PARAMETER = "missing_required_parameter"
    INVALID_URL = "invalid_url"
    DUPLICATE_CUSTOM_ID = "duplicate_custom_id"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_MISMATCH = "model_mismatch"
    STREAMING_UNSUPPORTED = "streaming_unsupported"
    EMPTY_FILE = "empty_file"
    TOO_MANY_TASKS = "too_many_tasks"
    INVALID_REQUEST = "invalid_request"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. ``line``: physical, from 1; ``None`` where it is the file's. ``param``: what part is at fault."""

    code: FaultCode
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(slots=True)
class Report:
    """What a scan found. ``faults``: by line, ``MOST_ERRORS`` at most, of ``n_faults``; ``models``: names in the lines,
    in the order of their first line."""

    faults: list[Fault] = field(default_factory=list)
    n_faults: int = 0
    n_lines: int = 0
    endpoint: str | None = None
    models: dict[str, None] = field(default_factory=dict)

    def add(self, fault: Fault) -> None:
        self.n_faults += 1
        if len(self.faults) < MOST_ERRORS:
            self.faults.append(fault)


class _Readable(Protocol):
    def read(self, n: int, /) -> bytes: ...


def physical_lines(stream: _Readable, most: int = LINE_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file that are not blank, each with its number from 1; ``None`` for one longer than ``most`` bytes.

    A byte order mark, CRLF and a missing last newline are fine. Memory holds one line, or a block where it is shorter.
    """
    number, rest, skipping, first = 1, b"", False, True
    while True:
        block = stream.read(_BLOCK)
        if first:
            block, first = block.removeprefix(codecs.BOM_UTF8), False
        if not block:
            if rest.strip() or skipping:
                yield number, None if skipping or len(rest) > most else rest
            return
        *whole, last = block.split(b"\n")
        for at, piece in enumerate(whole):
            line = rest + piece if at == 0 else piece
            if (at == 0 and skipping) or len(line) > most:
                yield number, None
            elif line.strip():
                yield number, line
            number += 1
        if whole:
            rest, skipping = last, False
        else:
            rest += last
        if len(rest) > most:
            rest, skipping = b"", True
        elif skipping:
            rest = b""


def read_envelope(line: bytes) -> Mapping[str, Any] | None:
    """The envelope in a line, where it is one as far as its names tell; ``None`` for any other line."""
    try:
        value = json_text.loads(line)
    except ValueError:
        return None
    is_one = isinstance(value, dict) and {"custom_id", "url", "body"} <= value.keys()
    return value if is_one and isinstance(value["body"], dict) else None


def scan(
    lines: Iterable[tuple[int, bytes | None]],
    *,
    endpoint: str | None = None,
    several_models: bool = False,
    most_lines: int | None = None,
    line_bytes: int = LINE_BYTES,
    known_model: Callable[[str], bool] | None = None,
) -> Report:
    """Check the envelopes of a whole file, given by :func:`physical_lines`.

    ``endpoint``: the one that every line must have; ``None``: that of the first line. ``several_models``: lines may
    name different models. ``known_model``: whether there is a model of that name; it is asked once per name. One fault
    for each line at most. Memory: 16 bytes and their set for each line.
    """
    report, seen = Report(endpoint=endpoint), _Seen()
    is_known = None if known_model is None else functools.lru_cache(_NAMES)(known_model)
    for number, line in lines:
        report.n_lines += 1
        if most_lines is not None and report.n_lines > most_lines:
            message = f"the file has more than {most_lines:,} requests"
            report.add(Fault(FaultCode.TOO_MANY_TASKS, message, number))
            return report
        fault = (
            _fault(line, report, seen, several_models, is_known)
            if line is not None
            else (FaultCode.INVALID_REQUEST, f"the line is longer than {line_bytes:,} bytes", None)
        )
        if fault is not None:
            code, message, param = fault
            report.add(Fault(code, message, number, param))
    if report.n_lines == 0:
        report.add(Fault(FaultCode.EMPTY_FILE, "the file holds no request"))
    return report


class _Seen:
    """Names of requests, as digests: a name may be long, and there may be millions."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def twice(self, name: str) -> bool:
        digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
        known = digest in self._digests
        self._digests.add(digest)
        return known


_Found = tuple[FaultCode, str, str | None]
_Known = Callable[[str], bool] | None


def _fault(line: bytes, report: Report, seen: _Seen, several_models: bool, is_known: _Known) -> _Found | None:
    try:
        value = _parsed(line)
    except ValueError as error:
        return FaultCode.INVALID_JSON_LINE, f"the line is not JSON: {error}", None
    if not isinstance(value, dict):
        return FaultCode.INVALID_JSON_LINE, "the line is not a JSON object", None
    for name in _FIELDS:
        if value.get(name) is None:
            return FaultCode.MISSING_REQUIRED_PARAMETER, f"{name} is required", name
    return (
        _of_the_name(value["custom_id"], seen)
        or _of_the_url(value, report)
        or _of_the_body(value["body"], report, several_models, is_known)
    )


def _parsed(line: bytes) -> Any:
    try:
        value = json.loads(line.decode(), parse_constant=_no_constant, parse_int=_whole)
    except RecursionError:
        raise json_text.TooDeep from None
    json_text.check_depth(value)
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _whole(digits: str) -> int | float:
    # Python takes very long for very many digits, and then refuses. Whether it fits is the request's own matter.
    return int(digits) if len(digits) < _DIGITS else float("inf")


def _of_the_name(name: Any, seen: _Seen) -> _Found | None:
    if not isinstance(name, str) or not name:
        return FaultCode.INVALID_REQUEST, "custom_id must be text that is not empty", "custom_id"
    try:
        plain_text(name)
    except ValueError as error:
        return FaultCode.INVALID_REQUEST, f"custom_id: {error}", "custom_id"
    if seen.twice(name):
        return FaultCode.DUPLICATE_CUSTOM_ID, f"custom_id {name[:100]!r} is that of an earlier line", "custom_id"
    return None


def _of_the_url(value: Mapping[str, Any], report: Report) -> _Found | None:
    if value["method"] != "POST":
        return FaultCode.INVALID_REQUEST, "method must be POST", "method"
    url = value["url"]
    if not isinstance(url, str) or url not in TASK_OF:
        return FaultCode.INVALID_URL, f"url must be one of {', '.join(TASK_OF)}", "url"
    report.endpoint = report.endpoint or url
    if url != report.endpoint:
        return FaultCode.INVALID_URL, f"url {url} differs from that of the batch, {report.endpoint}", "url"
    return None


def _of_the_body(body: Any, report: Report, several_models: bool, is_known: _Known) -> _Found | None:
    if not isinstance(body, dict):
        return FaultCode.INVALID_REQUEST, "body must be an object", "body"
    assert report.endpoint is not None
    for name in ("model", PROMPT_OF[report.endpoint]):
        if body.get(name) is None:
            return FaultCode.MISSING_REQUIRED_PARAMETER, f"body.{name} is required", f"body.{name}"
    model = body["model"]
    if not isinstance(model, str) or not model:
        return FaultCode.INVALID_REQUEST, "body.model must be the name of a model", "body.model"
    if body.get("stream"):
        return FaultCode.STREAMING_UNSUPPORTED, "a batch cannot stream; remove stream", "body.stream"
    if is_known is not None and not is_known(model):
        return FaultCode.MODEL_NOT_FOUND, f"there is no model {model[:100]!r} here", "body.model"
    report.models.setdefault(model)
    if not several_models and model != (first := next(iter(report.models))):
        return FaultCode.MODEL_MISMATCH, f"the line names model {model!r}, and the batch {first!r}", "body.model"
    return None
