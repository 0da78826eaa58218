"""The lines of a batch file: how they are read, and what is wrong with them."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.requests.envelope import MOST_ERRORS, Report, physical_lines, scan
from pipeline.spec.request_fields import CHAT, EMBEDDINGS


def request(name: str = "a", url: str = CHAT, **more: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    return {"custom_id": name, "method": "POST", "url": url, "body": body} | more


def scanned(*lines: Any, **options: Any) -> Report:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return scan(physical_lines(io.BytesIO(b"\n".join(encoded))), **options)


def faults(*lines: Any, **options: Any) -> list[tuple[int | None, str]]:
    return [(each.line, str(each.code)) for each in scanned(*lines, **options).faults]


def test_a_good_file() -> None:
    report = scanned(request("a"), b"", request("b"), b"  ")
    assert (report.n_faults, report.n_lines, report.endpoint, list(report.models)) == (0, 2, CHAT, ["m"])


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"[1]", "invalid_json_line"),
        (b"\xff\xfe", "invalid_json_line"),
        (b'{"a": NaN}', "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (request(custom_id=None), "missing_required_parameter"),
        (request(custom_id=3), "invalid_request"),
        (request(custom_id=""), "invalid_request"),
        (request("a\0"), "invalid_request"),
        (b'{"custom_id": "\\ud800", "method": "POST", "url": "u", "body": {}}', "invalid_request"),
        (request(method="GET"), "invalid_request"),
        ({"custom_id": "a", "method": "POST", "url": CHAT}, "missing_required_parameter"),
        (request(url="/v1/frobnicate"), "invalid_url"),
        (request(url=EMBEDDINGS), "invalid_url"),
        (request(body=[]), "invalid_request"),
        (request(body={"model": "m"}), "missing_required_parameter"),
        (request(body={"messages": []}), "missing_required_parameter"),
        (request(body={"model": 3, "messages": []}), "invalid_request"),
        (request(body={"model": "m", "messages": [], "stream": True}), "streaming_unsupported"),
        (request(body={"model": "other", "messages": []}), "model_mismatch"),
        (request("first"), "duplicate_custom_id"),
    ],
)
def test_one_fault_of_an_envelope_is_one_error_with_its_line(line: Any, code: str) -> None:
    assert faults(b"", request("first"), line, request("last")) == [(3, code)]


def test_faults_inside_a_body_are_not_the_files() -> None:
    body = {"model": "m", "messages": "x", "n": -1, "what": 10**400}
    assert faults(request(body=body)) == []


def test_an_empty_file_has_a_fault_without_a_line() -> None:
    assert faults(b"", b" ") == [(None, "empty_file")]


def test_options_of_a_scan() -> None:
    other = request("b", body={"model": "other", "messages": []})
    assert faults(request("a"), other, several_models=True) == []
    assert faults(request("a"), request("b"), most_lines=1) == [(2, "too_many_tasks")]
    assert faults(request("a"), endpoint=EMBEDDINGS) == [(1, "invalid_url")]


def test_very_many_faults_are_counted() -> None:
    report = scanned(*[b"{"] * (MOST_ERRORS + 5))
    assert (len(report.faults), report.n_faults) == (MOST_ERRORS, MOST_ERRORS + 5)


def test_a_line_that_is_too_long_is_found_without_keeping_it() -> None:
    long = b"x" * 3_000_000
    content = b"a\n" + long + b"\nb\n" + long
    found = list(physical_lines(io.BytesIO(content), 100))
    assert found == [(1, b"a"), (2, None), (3, b"b"), (4, None)]


@given(st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line)), st.sampled_from([b"\n", b"\r\n"]))
def test_lines_keep_their_numbers(lines: list[bytes], end: bytes) -> None:
    mark = "\ufeff".encode()
    found = list(physical_lines(io.BytesIO(mark + end.join(lines))))
    numbered = [(at, line) for at, line in enumerate(lines, 1) if line.strip()]
    assert [(at, (line or b"").strip()) for at, line in found] == [(at, line.strip()) for at, line in numbered]
