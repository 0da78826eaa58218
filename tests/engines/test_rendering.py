"""How values become text in prompts: the table in the docs, floats, times, and what has no text."""

from __future__ import annotations

import datetime
import json
import re
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.engines.rendering import refusal, texts
from storage.errors import RowError

UNITS: dict[Any, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/chat.md"
DAY, MOMENT = datetime.date(2026, 3, 14), datetime.datetime(2026, 3, 14, 8, 30)


def extended(kind: Any, storage: list[Any]) -> pa.Array[Any]:
    return pa.ExtensionArray.from_storage(kind, pa.array(storage, kind.storage_type))


def run_ends() -> pa.Array[Any]:
    return pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["red"]))


SHOWN: dict[str, list[pa.Array[Any]]] = {
    "string, and binary that is UTF-8": [
        pa.array(["grüße"]),
        pa.array(["grüße"], pa.large_string()),
        pa.array(["grüße"], pa.string_view()),
        pa.array(["grüße".encode()]),
        pa.array(["grüße".encode()], pa.binary(7)),
    ],
    "dictionary, run-end encoded": [pa.array(["red"]).dictionary_encode(), run_ends()],
    "bool, `arrow.bool8`": [pa.array([True]), extended(pa.bool8(), [1]), extended(pa.bool8(), [2])],
    "integers": [pa.array([-7]), pa.array([-7], pa.int8())],
    "float64": [pa.array([0.1])],
    "float32, float16": [pa.array([0.1], pa.float32()), pa.array([0.1], pa.float16())],
    "decimal": [
        pa.array([Decimal("1.20")], kind)
        for kind in (pa.decimal32(5, 2), pa.decimal64(5, 2), pa.decimal128(38, 2), pa.decimal256(70, 2))
    ],
    "date": [pa.array([DAY], pa.date32()), pa.array([DAY], pa.date64())],
    "time": [pa.array([MOMENT.time()], pa.time32("ms"))],
    "timestamp": [pa.array([MOMENT], pa.timestamp("us"))],
    "timestamp with a zone": [
        pa.array([MOMENT], pa.timestamp("s", "Europe/Berlin")),
        pa.array([MOMENT], pa.timestamp("s", "+01:00")),
    ],
    "duration": [pa.array([90 * scale], pa.duration(unit)) for unit, scale in UNITS.items()],
    "interval": [pa.array([(1, 2, 3_500_000_000)], pa.month_day_nano_interval())],
    "`arrow.uuid`": [extended(pa.uuid(), [uuid.UUID(int=5).bytes])],
    "`arrow.json`": [extended(pa.json_(), ['{"a": [1]}'])],
    "list": [
        pa.array([["x", "y"]]),
        pa.array([["x", "y"]], pa.list_(pa.string(), 2)),
        pa.array([["x", "y"]], pa.large_list_view(pa.string())),
        pa.array([["x", "y"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    ],
    "struct, map": [pa.array([{"n": 1, "day": DAY}])],
}


def table() -> dict[str, str]:
    """The first column of the table in the docs → its last."""
    rows = re.findall(r"^\| (.+?) \| .+ \| `(.+)` \|$", PAGE.read_text(), re.MULTILINE)
    return dict(rows)


def plain(column: pa.Array[Any]) -> list[str | tuple[str, str]]:
    found = texts(column, "v")
    return [(text.code, text.message) if isinstance(text, RowError) else text for text in found]


def test_the_table_in_the_docs_names_every_kind_tested_here() -> None:
    assert table().keys() == SHOWN.keys()


@pytest.mark.parametrize("kind", SHOWN)
def test_values_are_written_as_the_docs_say(kind: str) -> None:
    for column in SHOWN[kind]:
        assert refusal(column.type) is None
        assert plain(column) == [table()[kind]], column.type
        if not pa.types.is_run_end_encoded(column.type):
            around = pa.concat_arrays([column, pa.nulls(1, column.type), column, column])
            missing = ("missing_value", "column 'v' is null")
            assert plain(around.slice(1, 2)) == [missing, table()[kind]], column.type


@given(st.floats(width=32, allow_nan=False))
@example(3e10)
@example(16777217.0)
def test_floats_of_32_bits_read_back(number: float) -> None:
    (text,) = plain(pa.array([number], pa.float32()))
    assert isinstance(text, str) and np.float32(text) == np.float32(number)
    assert len(text) <= len(repr(float(np.float32(number))))


@given(st.floats(width=16, allow_nan=False))
@example(65504.0)
def test_floats_of_16_bits_read_back(number: float) -> None:
    (text,) = plain(pa.array([np.float16(number)], pa.float16()))
    assert isinstance(text, str) and np.float16(text) == np.float16(number)
    assert not number.is_integer() or float(text) == number


@given(st.sampled_from(list(UNITS)), st.integers(-(2**63), 2**63 - 1))
@example("s", 253402300799)
@example("s", 253402300800)
@example("us", 253402300800 * 10**6 - 1)
@example("ms", -62135596800_000)
@example("ms", -62135596800_001)
def test_timestamps_are_those_of_a_calendar_or_an_error(unit: Any, count: int) -> None:
    (text,) = plain(pa.array([count], pa.timestamp(unit)))
    seconds, rest = divmod(count, UNITS[unit])
    try:
        want = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)
    except OverflowError:
        assert isinstance(text, tuple) and text[0] == "invalid_value" and "'v'" in text[1]
        return
    assert isinstance(text, str)
    whole, _, fraction = text.partition(".")
    assert datetime.datetime.fromisoformat(whole) == want and int(fraction or 0) == rest


@given(st.sampled_from(list(UNITS)), st.integers(-(2**63), 2**63 - 1))
def test_durations_are_seconds(unit: Any, count: int) -> None:
    (text,) = plain(pa.array([count], pa.duration(unit)))
    assert isinstance(text, str)
    match = re.fullmatch(r"(-?)PT(\d+(?:\.\d*[1-9])?)S", text)
    assert match and Decimal(match[1] + match[2]) * UNITS[unit] == count


@pytest.mark.parametrize(
    ("column", "code"),
    [
        (pa.array([10**7], pa.date32()), "invalid_value"),
        (pa.array([2**60], pa.date64()), "invalid_value"),
        (pa.array([86_400], pa.time32("s")), "invalid_value"),
        (pa.array([-1], pa.time64("ns")), "invalid_value"),
        (pa.array([253402300799], pa.timestamp("s", "Asia/Tokyo")), "invalid_value"),
        (pa.array([[float("nan")]]), "invalid_value"),
        (pa.array([b"\xff"]), "invalid_utf8"),
        (pa.array([b"\xff"], pa.binary(1)), "invalid_utf8"),
        (pa.array([[10**18]], pa.list_(pa.timestamp("us"))), "invalid_value"),
        (pa.array([None]), "missing_value"),
    ],
)
def test_a_value_without_a_text_is_its_rows_error(column: pa.Array[Any], code: str) -> None:
    assert refusal(column.type) is None
    (text,) = plain(column)
    assert text[0] == code and "'v'" in text[1]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (pa.opaque(pa.binary(), "geometry", "postgis"), "arrow.opaque"),
        (pa.fixed_shape_tensor(pa.float32(), [2]), "tensor"),
        (pa.list_(pa.binary()), "bytes"),
        (pa.struct([pa.field("raw", pa.list_(pa.binary(4)))]), "bytes"),
        (pa.dense_union([pa.field("a", pa.int8())]), "union"),
        (pa.timestamp("s", "Mars/Olympus"), "Mars/Olympus"),
        (pa.map_(pa.list_(pa.int8()), pa.int8()), "keys"),
    ],
)
def test_a_type_without_a_text_says_what_to_do(kind: pa.DataType, words: str) -> None:
    assert words in str(refusal(kind))


@given(st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), st.lists(st.text()))))))
def test_lists_are_json(rows: list[Any]) -> None:
    found = plain(pa.array([[], *rows], pa.list_(pa.list_(pa.string()))).slice(1))
    assert [None if isinstance(text, tuple) else json.loads(text) for text in found] == rows


@given(st.lists(st.one_of(st.none(), st.dictionaries(st.text(), st.integers(-100, 100)))))
def test_maps_are_json(rows: list[Any]) -> None:
    pairs = [None if row is None else list(row.items()) for row in rows]
    found = plain(pa.array([[("x", 1)], *pairs], pa.map_(pa.string(), pa.int8())).slice(1))
    assert [None if isinstance(text, tuple) else json.loads(text) for text in found] == rows
