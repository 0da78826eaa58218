"""Pure: how far the results of one model are from those of another, over the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Drift:
    """``rows`` were compared; in ``only_one`` more rows one of the two models gave an error and the other did not.

    ``max_difference``: of two numbers of the same row; ``cosine_mean``, ``cosine_min``: between the rows' vectors;
    ``agreement``: the share of rows with the same label, or with equal values where results are no numbers. ``None``
    where a kind of result does not occur.
    """

    rows: int
    only_one: int
    max_difference: float | None
    cosine_mean: float | None
    cosine_min: float | None
    agreement: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a drift may be; ``None`` does not look at it."""

    min_cosine: float | None = None
    mean_cosine: float | None = None
    agreement: float | None = None
    max_difference: float | None = None

    def broken(self, drift: Drift) -> list[str]:
        """What is beyond its limit, in words. Rows that only one of the models computed are never within limits."""
        found = []
        if drift.only_one:
            found.append(f"{drift.only_one} rows have an error in one of the two results only")
        if not drift.rows:
            found.append("no row was computed by both")
        for name, value, limit, below in (
            ("worst cosine", drift.cosine_min, self.min_cosine, True),
            ("mean cosine", drift.cosine_mean, self.mean_cosine, True),
            ("agreement", drift.agreement, self.agreement, True),
            ("largest difference", drift.max_difference, self.max_difference, False),
        ):
            if value is None or limit is None:
                continue
            if math.isnan(value) or (value < limit if below else value > limit):
                found.append(f"{name} is {value:.6g}, {'less' if below else 'more'} than {limit:g}")
        return found


class Comparison:
    """Adds up differences table by table; each pair has the same rows in the same order."""

    def __init__(self) -> None:
        self._rows = self._only_one = self._agreeing = self._agreement_of = 0
        self._largest: float | None = None
        self._cosines: list[Numbers] = []

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
            self._compare(name, a, b)

    def _compare(self, name: str, a: Any, b: Any) -> None:
        if name == "scores" and pa.types.is_list(a.type):  # of labels, in one order
            a, b = (_scores(column) for column in (a, b))
        if pa.types.is_string(a.type):
            self._agreeing += sum(x == y for x, y in zip(a.to_pylist(), b.to_pylist(), strict=True))
            self._agreement_of += len(a)
            return
        cosines = []
        for x, y in zip(_vectors(a), _vectors(b), strict=True):
            if x is None or y is None or x.shape != y.shape:
                raise ValueError(f"column {name!r} has rows of different shapes")
            if x.size:
                with np.errstate(invalid="ignore"):
                    difference = np.where(x == y, 0.0, np.abs(x - y))
                largest = float(np.where(np.isnan(x) & np.isnan(y), 0.0, difference).max())
                # A NaN on one side only is as far away as can be.
                largest = math.inf if math.isnan(largest) else largest
                self._largest = max(self._largest or 0.0, largest)
            if x.size > 1 and name not in ("scores",):
                norms = float(np.linalg.norm(x) * np.linalg.norm(y))
                cosines.append(float(x @ y) / norms if norms else 1.0 if not x.any() and not y.any() else 0.0)
        if cosines:
            self._cosines.append(np.asarray(cosines))

    def result(self) -> Drift:
        cosines = np.concatenate(self._cosines) if self._cosines else None
        return Drift(
            rows=self._rows,
            only_one=self._only_one,
            max_difference=self._largest,
            cosine_mean=None if cosines is None else float(cosines.mean()),
            cosine_min=None if cosines is None else float(cosines.min()),
            agreement=self._agreeing / self._agreement_of if self._agreement_of else None,
        )


def _scores(column: Any) -> Any:
    values = column.values.field("score")
    return pa.ListArray.from_arrays(column.offsets, values)


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
