from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.models.compare import DEFAULTS, Comparison, Limits, OutputDiff

ERROR = pa.struct([("code", pa.string()), ("message", pa.string())])


def table(errors: list[bool] | None = None, **columns: Any) -> pa.Table:
    n = len(next(iter(columns.values())))
    bad = errors or [False] * n
    return pa.table({**columns, "error": pa.array([{"code": "x", "message": ""} if e else None for e in bad], ERROR)})


def compare(a: pa.Table, b: pa.Table) -> OutputDiff:
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


RNG = np.random.default_rng(3)
UNIT = RNG.normal(size=(40, 8))
UNIT /= np.linalg.norm(UNIT, axis=1, keepdims=True)
SCORES = RNG.uniform(0.2, 0.9, 40)


def scores_of(probabilities: Any, labels: str = "abc") -> pa.Array:
    rows = [[{"label": label, "score": p} for label, p in zip(labels, row, strict=True)] for row in probabilities]
    return pa.array(rows, pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())])))


def classified(logits: Any, labels: str = "abc") -> pa.Table:
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return table(label=[labels[at] for at in p.argmax(axis=1)], score=p.max(axis=1), scores=scores_of(p, labels))


LOGITS = RNG.normal(size=(40, 3))
RESULTS = {
    "embed": lambda x: table(embedding=vectors(x)),
    "score": lambda x: table(score=pa.array(x, pa.float32())),
    "tensor": lambda x: table(y=vectors(x)),
    "classify": classified,
}
ORIGINAL = {"embed": UNIT, "score": SCORES, "tensor": UNIT, "classify": LOGITS}


@pytest.mark.parametrize("task", DEFAULTS)
def test_every_task_passes_noise_and_fails_another_answer_by_default(task: str) -> None:
    made, x = RESULTS[task], np.asarray(ORIGINAL[task])
    limits = DEFAULTS[task]
    noise = RNG.normal(size=x.shape) * 0.005 * x.std()
    assert limits.broken(compare(made(x), made(x))) == []
    near = x + noise
    if task == "embed":
        near = near / np.linalg.norm(near, axis=1, keepdims=True)
    assert limits.broken(compare(made(x), made(near))) == []
    others = {"negated": -x, "tripled": 3 * x, "rows in another order": x[::-1]}
    if task != "classify":  # more of every logit is the same class
        others |= {"moved": x + 1, "constant": np.full_like(x, x.mean())}
    for name, other in others.items():
        assert limits.broken(compare(made(x), made(other))), (task, name)


def test_a_small_spread_hides_no_negated_head() -> None:
    """Scores near one half: every difference is small, and the order of the rows is the other way round."""
    x = 0.5 + 0.01 * RNG.normal(size=40)
    found = compare(RESULTS["score"](x), RESULTS["score"](1 - x))
    assert found.max_difference is not None and found.max_difference < 0.1
    assert "relative difference is 2" in DEFAULTS["score"].broken(found)[0]


def test_a_normalize_that_is_dropped_or_added_shows_in_the_lengths() -> None:
    made = RESULTS["embed"]
    longer = UNIT * RNG.uniform(0.95, 1.05, (40, 1))
    for one, two in ((UNIT, longer), (longer, UNIT), (UNIT, 7 * longer)):
        found = compare(made(one), made(two))
        assert found.cosine_min is not None and found.cosine_min > 0.999999 and found.unit_length
        assert "change of a vector's length is" in DEFAULTS["embed"].broken(found)[0]
    assert DEFAULTS["embed"].broken(compare(made(3 * UNIT), made(3 * longer))) == []


def test_classes_are_compared_by_name() -> None:
    one, two = classified(LOGITS), classified(LOGITS[:, ::-1], "cba")
    found = compare(one, two)
    assert (found.agreement, found.max_difference) == (1.0, pytest.approx(0.0, abs=1e-12))
    with pytest.raises(ValueError, match="labels have different names"):
        compare(one, classified(LOGITS, "abd"))


def test_a_limit_that_finds_nothing_to_measure_is_broken() -> None:
    found = compare(table(y=["a", "b"]), table(y=["a", "b"]))
    assert Limits(min_cosine=0.9).broken(found) == ["nothing in the results is measured by a limit"]
    assert "the results have no worst cosine" in Limits(min_cosine=0.9, agreement=1).broken(found, {"min_cosine"})


@given(hnp.arrays(np.float64, (2, 9), elements=st.floats(-9, 9)))
def test_the_relative_difference_is_numpys(pair: Any) -> None:
    one, two = pair.astype(np.float32).astype(np.float64)
    found = compare(*(table(score=pa.array(x, pa.float32())) for x in (one, two)))
    spread = max(one.std(), 0.01 * np.sqrt((one**2).mean()))
    changed = np.sqrt(((one - two) ** 2).mean())
    if spread > 1e-6:
        assert found.relative_difference == pytest.approx(changed / spread, rel=1e-6)
    nan = compare(table(y=[1.0, 2.0, math.nan]), table(y=[1.0, math.nan, math.nan]))
    assert nan.relative_difference == math.inf
