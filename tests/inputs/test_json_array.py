"""A JSON array as JSON Lines: the same elements in any cut of the file, and errors that name the element."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inputs import json_array
from storage.errors import InvalidInput

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


class Dribble(io.RawIOBase):
    """Hands out a few bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data, self._step = io.BytesIO(data), step

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._data.read(min(self._step, len(buffer)))
        buffer[: len(data)] = data
        return len(data)


def lines(data: bytes, step: int = 1, most: int = 1000) -> list[bytes]:
    stream = io.BufferedReader(Dribble(data, step), step)
    stream.read = stream.read1  # type: ignore[assignment, method-assign]
    return json_array.as_lines(stream, "f.json", most).read().splitlines()  # type: ignore[no-any-return]


@given(st.lists(VALUES, max_size=5), st.integers(1, 20), st.sampled_from([None, 1]), st.booleans())
def test_elements_become_lines(values: list[Any], step: int, indent: int | None, escaped: bool) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    assert [json.loads(line.decode("utf-8", "surrogatepass")) for line in lines(data, step, 10**6)] == values


def test_text_stays_what_it_is() -> None:
    assert lines(b'[\n {"a": 1.50,\r\n "b": "x\\ny"}\n, 1e3]\n') == [b' {"a": 1.50,   "b": "x\\ny"}'.strip(), b"1e3"]
    assert lines(b'["\xff"]') == [b'"\xff"']
    assert lines(b'{"a": 1}\n', step=100) == [b'{"a": 1}']
    assert lines(b"[]") == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1, 2", "element 2 of the array: the file ends within the array"),
        (b"[1, ", "element 1 of the array: the file ends within the array"),
        (b"[1, }, 3" + b" " * 50, "element 2 of the array: Expecting value"),
        (b"[1 2]", "element 1 .* neither a comma"),
        (b"[1] [2]", "more after the array"),
        (b"[" + b"[" * 100_000, "element 1 of the array: nested more than"),
        (b'["' + b"x" * 2000 + b'"]', "longer than"),
    ],
)
def test_faults_name_the_element(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"f.json, {message}" if message.startswith("element") else message):
        lines(data, 1000 if len(data) > 5000 else 3, 10**6 if len(data) > 5000 else 1000)
