from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.drift import Comparison, Drift, Limits

ERROR = pa.struct([("code", pa.string()), ("message", pa.string())])


def table(errors: list[bool] | None = None, **columns: Any) -> pa.Table:
    n = len(next(iter(columns.values())))
    bad = errors or [False] * n
    return pa.table({**columns, "error": pa.array([{"code": "x", "message": ""} if e else None for e in bad], ERROR)})


def compare(a: pa.Table, b: pa.Table) -> Drift:
    comparison = Comparison()
    half = len(a) // 2
    names = [name for name in a.column_names if name != "error"]
    comparison.add(a.slice(0, half), b.slice(0, half), names)
    comparison.add(a.slice(half), b.slice(half), names)
    return comparison.result()


def vectors(rows: Any) -> pa.Array:
    return pa.array(np.asarray(rows, np.float32).tolist(), pa.list_(pa.float32(), len(rows[0])))


@given(hnp.arrays(np.float32, (7, 3), elements=st.floats(-9, 9, width=32)))
def test_a_model_is_no_distance_from_itself(rows: Any) -> None:
    a = table(embedding=vectors(rows))
    found = compare(a, a)
    assert (found.rows, found.only_one, found.max_difference) == (7, 0, 0.0)
    assert found.cosine_min is not None and found.cosine_min > 1 - 1e-6
    assert Limits(0.99, 0.99, 0.99, 0.0).broken(found) == []


@given(
    hnp.arrays(np.float32, (6, 4), elements=st.floats(1, 9, width=32)),
    hnp.arrays(np.float32, (6, 4), elements=st.floats(-9, 9, width=32)),
)
def test_distances_are_numpys(one: Any, two: Any) -> None:
    two[:, 0] = 1  # no zero vector
    found = compare(table(embedding=vectors(one)), table(embedding=vectors(two)))
    a, b = one.astype(np.float64), two.astype(np.float64)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found.max_difference == pytest.approx(np.abs(a - b).max())
    assert found.cosine_min == pytest.approx(cosines.min(), abs=1e-9)
    assert found.cosine_mean == pytest.approx(cosines.mean(), abs=1e-9)


def test_labels_errors_and_nan_count() -> None:
    pair = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))
    scores = [[{"label": "a", "score": 0.75}, {"label": "b", "score": 0.25}]] * 4
    other = [*scores[:3], [{"label": "a", "score": 0.25}, {"label": "b", "score": 0.75}]]
    a = table([False, True, False, False], label=list("aaaa"), scores=pa.array(scores, pair))
    b = table([False, False, False, False], label=list("aaab"), scores=pa.array(other, pair))
    found = compare(a, b)
    assert (found.rows, found.only_one, found.max_difference) == (3, 1, 0.5)
    assert found.agreement == pytest.approx(2 / 3) and found.cosine_min is None
    told = " ".join(Limits(agreement=0.9, max_difference=0.1).broken(found))
    assert "1 rows have an error in one" in told and "agreement is 0.666667, less than 0.9" in told
    assert "largest difference is 0.5, more than 0.1" in told
    nan = compare(table(y=[1.0, math.nan, math.nan]), table(y=[1.0, math.nan, 2.0]))
    assert nan.max_difference == math.inf


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows against 1"):
        Comparison().add(table(y=[1.0, 2.0]), table(y=[1.0]), ["y"])
    with pytest.raises(ValueError, match="column 'y' is double in one result and string"):
        Comparison().add(table(y=[1.0]), table(y=["a"]), ["y"])
    assert Limits().broken(Comparison().result()) == ["no row was computed by both"]
