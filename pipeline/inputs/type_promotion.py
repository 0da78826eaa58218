"""The type that holds every value of several types exactly. Pure.

By rules of the types alone where they suffice; where they do not, such as for int64 beside double, by the range of the
values. There is no type for what would round, cut or reinterpret a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import types

from storage.parquet.arrow_schemas import ENTRY, ITEM, Path

Range = tuple[int, int]
"""Least and greatest value: whole numbers themselves, timestamps and durations in nanoseconds."""
RangeOf = Callable[[Path], Range | None]
"""Path → the range of all values there; ``None`` when there are none."""

NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_FLOATS = {16: (11, pa.float16()), 32: (24, pa.float32()), 64: (53, pa.float64())}
"""Bits → (bits of the whole numbers that it holds without a gap, type)."""
_INTEGERS: dict[str, pa.DataType] = {
    str(kind): kind
    for kind in (
        *(pa.int8(), pa.int16(), pa.int32(), pa.int64()),
        *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    )
}
_DIGITS = {8: 3, 16: 5, 32: 10, 64: 20}
_MOST_DIGITS, _MOST_DIGITS_256 = 38, 76


class NoCommonType(Exception):
    """The reason, as the end of a sentence."""


def common_type(kinds: Iterable[pa.DataType], range_of: RangeOf, path: Path) -> pa.DataType:
    """The type for values of all of ``kinds``, which lie at ``path``; a type alone, or beside null, stays what it is.

    Raises :class:`NoCommonType`.
    """
    found: list[Any] = [kind for kind in dict.fromkeys(kinds) if not types.is_null(kind)]
    if len(found) < 2:
        return found[0] if found else pa.null()
    if any(isinstance(kind, pa.BaseExtensionType) for kind in found):
        return common_type(_storage(found, path), range_of, path)
    folded = [kind for kind in found if types.is_dictionary(kind)]
    if folded:
        values: Any = common_type([kind.value_type if kind in folded else kind for kind in found], range_of, path)
        if len(folded) < len(found):
            return values  # type: ignore[no-any-return]
        ordered: Any = all(kind.ordered for kind in folded)
        return pa.dictionary(pa.int32(), values, ordered)
    for fits, rule in _RULES:
        if all(map(fits, found)):
            merged: pa.DataType = rule(found, range_of, path)
            return merged
    raise NoCommonType(f"{_at(path)}no type holds values of both kinds")


def _at(path: Path) -> str:
    return f"in {'.'.join(path)}, " if len(path) > 1 else ""


def _storage(kinds: Sequence[Any], path: Path) -> list[Any]:
    """What lies under one extension type, beside plain columns of the same storage: JSON beside text, for instance."""
    named = [kind for kind in kinds if isinstance(kind, pa.BaseExtensionType)]
    plain = [kind for kind in kinds if kind not in named]
    storage = named[0].storage_type
    if len(named) > 1 or not all(kind == storage or (_is_text(kind) and _is_text(storage)) for kind in plain):
        raise NoCommonType(f"{_at(path)}an extension type goes with no other type than its storage")
    return [storage, *plain]


def _is_text(kind: Any) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _text(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    return pa.large_string() if any(map(types.is_large_string, kinds)) else pa.string()


def _is_bytes(kind: Any) -> bool:
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _bytes(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    return pa.large_binary() if any(map(types.is_large_binary, kinds)) else pa.binary()


def _is_number(kind: Any) -> bool:
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


def _number(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    whole = [kind for kind in kinds if types.is_integer(kind)]
    floats = [kind for kind in kinds if types.is_floating(kind)]
    decimals = [kind for kind in kinds if types.is_decimal(kind)]
    if floats and decimals:
        raise NoCommonType(f"{_at(path)}a decimal beside a floating-point number would be rounded")
    if decimals:
        return _decimal(whole, decimals, path)
    if floats:
        return _float(whole, floats, range_of, path)
    return _integer(whole, range_of, path)


def _integer(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    signed = max((kind.bit_width for kind in kinds if types.is_signed_integer(kind)), default=0)
    unsigned = max((kind.bit_width for kind in kinds if types.is_unsigned_integer(kind)), default=0)
    bits = max(signed, 2 * unsigned) if signed else unsigned
    if bits <= 64:
        return _INTEGERS[f"int{bits}" if signed else f"uint{bits}"]
    low, high = range_of(path) or (0, 0)
    if high < 2**63:
        return pa.int64()
    if low >= 0:
        return pa.uint64()
    return pa.decimal128(_DIGITS[64], 0)


def _float(whole: Sequence[Any], floats: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    widest = max(kind.bit_width for kind in floats)
    bits = max((kind.bit_width - types.is_signed_integer(kind) for kind in whole), default=0)
    for width, (exact, kind) in _FLOATS.items():
        if width >= widest and bits <= exact:
            return kind
    found = range_of(path) or (0, 0)
    if found[0] >= -(2**53) and found[1] <= 2**53:
        return pa.float64()
    raise NoCommonType(f"{_at(path)}{max(found, key=abs)} beside floating-point numbers would be rounded")


def _decimal(whole: Sequence[Any], decimals: Sequence[Any], path: Path) -> pa.DataType:
    scale = max(0, *(kind.scale for kind in decimals))
    before = max(
        *(kind.precision - kind.scale for kind in decimals),
        *(_DIGITS[kind.bit_width] - (kind == pa.int64()) for kind in whole),
        0,
    )
    digits = before + scale
    wide = any(types.is_decimal256(kind) for kind in decimals)
    if digits > (_MOST_DIGITS_256 if wide else _MOST_DIGITS):
        raise NoCommonType(f"{_at(path)}{before} digits before the point and {scale} after it are too many")
    return pa.decimal256(digits, scale) if wide else pa.decimal128(digits, scale)


def _finest(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> str:
    """The unit in which every value of a column of 64-bit times is a whole number that fits."""
    unit: str = min((kind.unit for kind in kinds), key=NANOSECONDS.__getitem__)
    if len({kind.unit for kind in kinds}) > 1:
        found = range_of(path) or (0, 0)
        if any(not -(2**63) < value // NANOSECONDS[unit] < 2**63 for value in found):
            raise NoCommonType(f"{_at(path)}the unit {unit!r} does not reach as far as the times of the other unit do")
    return unit


def _timestamp(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    zones = {kind.tz for kind in kinds}
    if None in zones and len(zones) > 1:
        raise NoCommonType(f"{_at(path)}times with a time zone are instants, those without are not")
    zone = zones.pop() if len(zones) == 1 else "UTC"
    unit: Any = _finest(kinds, range_of, path)
    return pa.timestamp(unit, zone)


def _duration(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    unit: Any = _finest(kinds, range_of, path)
    return pa.duration(unit)


def _time(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    return min(kinds, key=lambda kind: NANOSECONDS[kind.unit])  # type: ignore[no-any-return]


def _date(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    return pa.date32()


def _struct(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    fields: dict[str, list[pa.Field[Any]]] = {}
    for kind in kinds:
        here = [kind.field(at) for at in range(kind.num_fields)]
        if len({item.name for item in here}) < len(here):
            raise NoCommonType(f"{_at(path)}a struct has two fields of one name")
        for item in here:
            fields.setdefault(item.name, []).append(item)
    return pa.struct([_field(found, len(kinds), range_of, (*path, name)) for name, found in fields.items()])


def _field(found: Sequence[Any], of: int, range_of: RangeOf, path: Path) -> pa.Field[Any]:
    """One field for all of ``found``, of ``of`` parents."""
    kind = common_type([item.type for item in found], range_of, path)
    return pa.field(found[0].name, kind, nullable=len(found) < of or any(item.nullable for item in found))


def _is_list(kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _list(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    item = _field([kind.value_field for kind in kinds], len(kinds), range_of, (*path, ITEM))
    if any(map(types.is_large_list, kinds)):
        return pa.large_list(item)
    sizes = {kind.list_size if types.is_fixed_size_list(kind) else -1 for kind in kinds}
    return pa.list_(item, sizes.pop() if len(sizes) == 1 else -1)


def _map(kinds: Sequence[Any], range_of: RangeOf, path: Path) -> pa.DataType:
    key: Any = _field([kind.key_field for kind in kinds], len(kinds), range_of, (*path, ENTRY, "key"))
    value: Any = _field([kind.item_field for kind in kinds], len(kinds), range_of, (*path, ENTRY, "value"))
    keys_sorted: Any = all(kind.keys_sorted for kind in kinds)
    return pa.map_(key, value, keys_sorted)


_RULES: tuple[tuple[Callable[[Any], bool], Any], ...] = (
    (_is_text, _text),
    (_is_bytes, _bytes),
    (_is_number, _number),
    (types.is_timestamp, _timestamp),
    (types.is_duration, _duration),
    (types.is_time, _time),
    (types.is_date, _date),
    (types.is_struct, _struct),
    (_is_list, _list),
    (types.is_map, _map),
)
