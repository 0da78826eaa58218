"""The type that holds the values of several types exactly, or the reason why there is none."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.inputs.type_promotion import NoCommonType, common_type

I64, U64, F64 = pa.int64(), pa.uint64(), pa.float64()


def merged(*kinds: pa.DataType, values: tuple[int, int] | None = None) -> pa.DataType:
    """The type of both orders, which must be the same one."""
    found = {common_type(order, lambda path: values, ("c",)) for order in (kinds, kinds[::-1])}
    assert len(found) == 1
    return found.pop()


def dictionary(value: Any, ordered: Any = False) -> pa.DataType:
    return pa.dictionary(pa.int32(), value, ordered)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (pa.null(), pa.list_(pa.int8()), pa.list_(pa.int8())),
        (pa.int8(), pa.int32(), pa.int32()),
        (pa.uint8(), pa.uint32(), pa.uint32()),
        (pa.int8(), pa.uint8(), pa.int16()),
        (pa.int64(), pa.uint32(), pa.int64()),
        (pa.float16(), pa.int8(), pa.float16()),
        (pa.float16(), pa.int16(), pa.float32()),
        (pa.float32(), pa.uint16(), pa.float32()),
        (pa.float32(), pa.int32(), F64),
        (pa.float32(), F64, F64),
        (pa.decimal128(5, 2), I64, pa.decimal128(21, 2)),
        (pa.decimal128(5, 2), U64, pa.decimal128(22, 2)),
        (pa.decimal128(5, 2), pa.decimal128(10, 6), pa.decimal128(10, 6)),
        (pa.decimal128(10, 2), pa.decimal128(10, 6), pa.decimal128(14, 6)),
        (pa.decimal256(50, 2), I64, pa.decimal256(50, 2)),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.string(), pa.string_view(), pa.string()),
        (pa.binary(3), pa.binary(4), pa.binary()),
        (pa.large_binary(), pa.binary(), pa.large_binary()),
        (pa.date32(), pa.date64(), pa.date32()),
        (pa.time32("ms"), pa.time64("ns"), pa.time64("ns")),
        (pa.timestamp("us", "UTC"), pa.timestamp("us", "Europe/Berlin"), pa.timestamp("us", "UTC")),
        (dictionary(pa.string()), pa.string(), pa.string()),
        (dictionary(pa.string()), dictionary(pa.string(), True), dictionary(pa.string())),
        (pa.list_(pa.int8()), pa.large_list(pa.int16()), pa.large_list(pa.int16())),
        (pa.list_(pa.int8(), 2), pa.list_(pa.int8(), 3), pa.list_(pa.int8())),
        (pa.list_(pa.null()), pa.list_(pa.struct([("a", pa.int8())])), pa.list_(pa.struct([("a", pa.int8())]))),
        (pa.map_(pa.string(), pa.int8()), pa.map_(pa.string(), F64), pa.map_(pa.string(), F64)),
        (pa.json_(), pa.string(), pa.string()),
        (pa.bool8(), pa.int8(), pa.int8()),
    ],
    ids=str,
)
def test_a_type_that_holds_both(one: pa.DataType, other: pa.DataType, both: pa.DataType) -> None:
    assert merged(one, other) == both


def test_a_struct_has_the_fields_of_both_and_may_lack_those_of_one() -> None:
    one = pa.struct([pa.field("a", pa.int8(), nullable=False), pa.field("b", pa.int8(), nullable=False)])
    other = pa.struct([pa.field("b", pa.int16(), nullable=False), pa.field("c", pa.string())])
    both = common_type([one, other], lambda path: None, ("c",))
    assert both == pa.struct(
        [pa.field("a", pa.int8()), pa.field("b", pa.int16(), nullable=False), pa.field("c", pa.string())]
    )


@pytest.mark.parametrize(
    ("one", "other", "values", "both"),
    [
        (I64, F64, (-(2**53), 2**53), F64),
        (I64, F64, None, F64),
        (U64, pa.float32(), (0, 5), F64),
        (U64, I64, (-1, 2**63 - 1), I64),
        (U64, I64, (0, 2**64 - 1), U64),
        (U64, I64, (-1, 2**64 - 1), pa.decimal128(20, 0)),
        (pa.timestamp("us"), pa.timestamp("ns"), (0, 2**62), pa.timestamp("ns")),
        (pa.timestamp("ms", "UTC"), pa.timestamp("us", "+01:00"), (0, 10**21), pa.timestamp("us", "UTC")),
        (pa.duration("s"), pa.duration("ns"), (-5, 5), pa.duration("ns")),
    ],
    ids=str,
)
def test_values_decide_where_types_do_not(
    one: pa.DataType, other: pa.DataType, values: tuple[int, int] | None, both: pa.DataType
) -> None:
    assert merged(one, other, values=values) == both


@pytest.mark.parametrize(
    ("one", "other", "values", "reason"),
    [
        (I64, F64, (0, 2**53 + 1), "9007199254740993"),
        (pa.decimal128(38, 19), F64, None, "rounded"),
        (pa.decimal128(38, 30), I64, None, "digits"),
        (pa.timestamp("us"), pa.timestamp("ns"), (0, 253402300799 * 10**9), "'ns'"),
        (pa.duration("s"), pa.duration("ns"), (0, 2**63), "'ns'"),
        (pa.timestamp("us"), pa.timestamp("us", "UTC"), None, "time zone"),
        (pa.timestamp("us"), pa.date32(), None, "both kinds"),
        (pa.string(), pa.binary(), None, "both kinds"),
        (dictionary(pa.string()), dictionary(pa.binary()), None, "both kinds"),
        (pa.bool_(), pa.int8(), None, "both kinds"),
        (pa.uuid(), pa.string(), None, "extension"),
        (pa.list_view(pa.int8()), pa.list_(pa.int8()), None, "both kinds"),
        (pa.list_(pa.int8()), pa.int8(), None, "both kinds"),
        (pa.list_(pa.struct([("a", I64)])), pa.list_(pa.struct([("a", F64)])), (0, 2**60), r"c\.\[\]\.a"),
    ],
    ids=str,
)
def test_no_type_holds_both(one: pa.DataType, other: pa.DataType, values: tuple[int, int] | None, reason: str) -> None:
    with pytest.raises(NoCommonType, match=reason):
        merged(one, other, values=values)
