"""Pure: how far the results of one model are from those of another, over the same rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Numbers = npt.NDArray[np.float64]

_AT_LEAST = ("min_cosine", "mean_cosine", "agreement")
UNIT = 0.01
"""How far from 1 the length of a unit vector may be."""


@dataclass(frozen=True, slots=True)
class OutputDiff:
    """``rows`` were compared; in ``only_one`` more rows one of the two models gave an error and the other did not.

    ``max_difference``: of two numbers of the same row; ``cosine_mean``, ``cosine_min``: between the rows' vectors;
    ``agreement``: the share of rows with the same label, or with equal values where results are no numbers. ``None``
    where a kind of result does not occur.

    ``relative_difference``: of a column's numbers, the root mean square of what they changed by, over their spread
    (standard deviation) in the original, the worst column; a negated or doubled result has 1 or more.
    ``length_change``: by what share the length of a row's vector changed, the worst row, which no cosine shows.
    ``unit_length``: whether all vectors of one of the two have length 1.
    """

    rows: int
    only_one: int
    max_difference: float | None
    cosine_mean: float | None
    cosine_min: float | None
    agreement: float | None
    relative_difference: float | None = None
    length_change: float | None = None
    unit_length: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far two outputs may differ; ``None`` does not look at it."""

    min_cosine: float | None = None
    mean_cosine: float | None = None
    agreement: float | None = None
    max_difference: float | None = None
    relative_difference: float | None = None
    length_change: float | None = None

    def broken(self, diff: OutputDiff, required: Collection[str] = ()) -> list[str]:
        """What is beyond its limit, in words; empty when all is within.

        Rows that only one of the models computed, results that no limit measures, and a ``required`` limit on
        something that the results do not have are listed too. Unit vectors must keep their length whatever
        ``length_change`` allows.
        """
        length = UNIT if diff.unit_length and self.length_change is not None else self.length_change
        found = []
        if diff.only_one:
            found.append(f"{diff.only_one} rows have an error in one of the two results only")
        if not diff.rows:
            found.append("no row was computed by both")
        held = [
            ("worst cosine", "min_cosine", diff.cosine_min, self.min_cosine),
            ("mean cosine", "mean_cosine", diff.cosine_mean, self.mean_cosine),
            ("agreement", "agreement", diff.agreement, self.agreement),
            ("largest difference", "max_difference", diff.max_difference, self.max_difference),
            ("relative difference", "relative_difference", diff.relative_difference, self.relative_difference),
            ("change of a vector's length", "length_change", diff.length_change, length),
        ]
        limited = [value for _, _, value, limit in held if limit is not None]
        if diff.rows and limited and all(value is None for value in limited):
            found.append("nothing in the results is measured by a limit")
        for name, field, value, limit in held:
            if value is None and field in required and diff.rows:
                found.append(f"the results have no {name}")
            if value is None or limit is None:
                continue
            below = field in _AT_LEAST
            if math.isnan(value) or (value < limit if below else value > limit):
                found.append(f"{name} is {value:.6g}, {'less' if below else 'more'} than {limit:g}")
        return found


DEFAULTS = {
    "embed": Limits(min_cosine=0.95, mean_cosine=0.985, length_change=0.1),
    "classify": Limits(agreement=0.99, relative_difference=0.25),
    "score": Limits(relative_difference=0.25),
    "tensor": Limits(min_cosine=0.95, mean_cosine=0.985, agreement=0.99, relative_difference=0.25, length_change=0.1),
}
"""Default limits for a model with 8-bit weights, by task. Every result of a task is measured by one of them."""


@dataclass(slots=True)
class _Spread:
    """Sums over a column's numbers: of the original's, and of the squares of what they changed by."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0
    changed: float = 0.0

    def add(self, x: Numbers, difference: Numbers) -> None:
        known = x[np.isfinite(x)]
        self.n += known.size
        self.total += float(known.sum())
        self.squares += float((known**2).sum())
        self.changed += float((difference**2).sum())

    def relative(self) -> float | None:
        if not self.n:
            return math.inf if self.changed else None
        size = self.squares / self.n
        # Numbers that are all alike have no spread: then a hundredth of their size counts as one.
        spread = math.sqrt(max(size - (self.total / self.n) ** 2, 1e-4 * size))
        changed = math.sqrt(self.changed / self.n)
        return changed / spread if spread else math.inf if changed else 0.0


class Comparison:
    """Adds up differences table by table; each pair has the same rows in the same order."""

    def __init__(self) -> None:
        self._rows = self._only_one = self._agreeing = self._agreement_of = 0
        self._largest: float | None = None
        self._cosines: list[float] = []
        self._lengths: list[tuple[float, float]] = []
        self._spreads: defaultdict[str, _Spread] = defaultdict(_Spread)

    def add(self, original: pa.Table, other: pa.Table, columns: Iterable[str]) -> None:
        """Compare the result columns of two outputs; both have the column ``error``.

        Raises ``ValueError`` when their lengths or types differ.
        """
        if len(original) != len(other):
            raise ValueError(f"{len(original)} rows against {len(other)}")
        fine = [np.asarray(table["error"].is_null().to_numpy()) for table in (original, other)]
        self._only_one += int((fine[0] != fine[1]).sum())
        both = pa.array(fine[0] & fine[1])
        original, other = original.filter(both), other.filter(both)
        self._rows += len(original)
        for name in columns:
            a, b = original[name].combine_chunks(), other[name].combine_chunks()
            if a.type != b.type:
                raise ValueError(f"column {name!r} is {a.type} in one result and {b.type} in the other")
            self._compare(name, a, b, of_classes=name == "score" and "scores" in original.column_names)

    def _compare(self, name: str, a: Any, b: Any, *, of_classes: bool) -> None:
        if name == "scores" and pa.types.is_list(a.type):
            (labels, a), (other, b) = (_by_label(column) for column in (a, b))
            if not labels.equals(other):
                raise ValueError("their labels have different names")
        if pa.types.is_string(a.type):
            self._agreeing += sum(x == y for x, y in zip(a.to_pylist(), b.to_pylist(), strict=True))
            self._agreement_of += len(a)
            return
        for x, y in zip(_vectors(a), _vectors(b), strict=True):
            if x is None or y is None or x.shape != y.shape:
                raise ValueError(f"column {name!r} has rows of different shapes")
            with np.errstate(invalid="ignore"):
                difference = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
            difference = np.nan_to_num(difference, nan=np.inf, posinf=np.inf)  # a NaN on one side only is far away
            if x.size:
                self._largest = max(self._largest or 0.0, float(difference.max()))
            if not of_classes:  # the best label's score alone has hardly any spread
                self._spreads[name].add(x, difference)
            if x.size > 1 and name != "scores":
                one, two = float(np.linalg.norm(x)), float(np.linalg.norm(y))
                norms = one * two
                self._cosines.append(float(x @ y) / norms if norms else 1.0 if not x.any() and not y.any() else 0.0)
                self._lengths.append((one, two))

    def result(self) -> OutputDiff:
        cosines = np.asarray(self._cosines) if self._cosines else None
        lengths = np.asarray(self._lengths) if self._lengths else None
        relative = [value for spread in self._spreads.values() if (value := spread.relative()) is not None]
        return OutputDiff(
            rows=self._rows,
            only_one=self._only_one,
            max_difference=self._largest,
            cosine_mean=None if cosines is None else float(cosines.mean()),
            cosine_min=None if cosines is None else float(cosines.min()),
            agreement=self._agreeing / self._agreement_of if self._agreement_of else None,
            relative_difference=max(relative, default=None),
            length_change=None if lengths is None else _length_change(lengths),
            unit_length=None if lengths is None else bool((np.abs(lengths - 1) <= UNIT).all(axis=0).any()),
        )


def _length_change(lengths: Numbers) -> float:
    """Of pairs of lengths, [n, 2]: the largest share by which a second one differs from its first."""
    one, two = lengths.T
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.where(one == two, 0.0, np.abs(two - one) / one)
    return float(np.nan_to_num(change, nan=np.inf).max())


def _by_label(column: Any) -> tuple[Any, Any]:
    """The labels of all rows, and each row's scores, both in the order of the labels' names."""
    sizes = np.asarray(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    flat = column.flatten()
    keys = pa.table({"row": np.repeat(np.arange(len(sizes)), sizes), "label": flat.field("label")})
    order = pc.sort_indices(keys, sort_keys=[("row", "ascending"), ("label", "ascending")])
    offsets = pa.array(np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]).astype(np.int32))
    return keys["label"].take(order), pa.ListArray.from_arrays(offsets, flat.field("score").take(order))


def _vectors(column: Any) -> Iterable[Numbers | None]:
    """Each row's numbers, flat."""
    if isinstance(column.type, pa.FixedShapeTensorType):
        column = column.storage
    for row in range(len(column)):
        one = column.slice(row, 1)
        if pa.types.is_struct(one.type):
            one = one.field("data")
        while pa.types.is_list(one.type) or pa.types.is_large_list(one.type) or pa.types.is_fixed_size_list(one.type):
            one = one.flatten()
        if one.null_count or not (
            pa.types.is_integer(one.type) or pa.types.is_floating(one.type) or pa.types.is_boolean(one.type)
        ):
            yield None
        else:
            yield np.asarray(one.to_numpy(zero_copy_only=False), np.float64)
