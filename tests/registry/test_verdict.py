"""When a sample shows that a model is right, when it shows that it is not, and when it shows nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.registry import verdict
from pipeline.registry.verdict import FAIL, INSUFFICIENT, PASS

SHOWN = {
    "rows": 400,
    "distinct": 400,
    "agreement_limit": None,
    "agreement": None,
    "labels": None,
    "median_cosine": None,
    "calibrated": 0,
}


def test_a_broken_limit_fails_whatever_else_is_open() -> None:
    assert verdict.decide([], []).verdict == PASS
    assert verdict.decide([], ["too few"]).verdict == INSUFFICIENT
    assert verdict.decide(["too far"], ["too few"]) == verdict.Verdict(FAIL, ("too far", "too few"))


def test_rows_that_show_a_share() -> None:
    assert not verdict.shows_share(298, 0, 0.99) and verdict.shows_share(299, 0, 0.99)
    assert not verdict.shows_share(299, 1, 0.99) and verdict.shows_share(473, 1, 0.99)
    assert (verdict.rows_needed(0.99), verdict.rows_needed(0.95)) == (299, 59)
    assert not verdict.shows_share(10**6, 0, 1.0) and verdict.shows_share(1, 1, 0.0)


@given(st.integers(1, 2000), st.integers(0, 20), st.floats(0.5, 0.999))
def test_the_bound_is_scipys(rows: int, disagreements: int, share: float) -> None:
    from scipy import stats

    disagreements = min(disagreements, rows)
    expected = stats.binom.cdf(disagreements, rows, 1 - share)
    if abs(expected - 0.05) > 1e-9:
        assert verdict.shows_share(rows, disagreements, share) == (expected <= 0.05)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, None),
        ({"distinct": 3}, "3 distinct rows"),
        ({"agreement_limit": 0.99, "agreement": 1.0}, None),
        ({"agreement_limit": 0.99, "agreement": 1.0, "distinct": 298}, "it takes 299"),
        ({"agreement_limit": 0.99, "agreement": 0.9925}, "3 disagreements"),
        ({"labels": 1}, "the same label"),
        ({"labels": 2}, None),
        ({"median_cosine": 0.995}, "all look alike"),
        ({"median_cosine": 0.98}, None),
        ({"calibrated": 2}, "2 of the rows calibrated"),
    ],
)
def test_what_a_sample_leaves_open(more: dict[str, float], says: str | None) -> None:
    found = verdict.unproved(**{**SHOWN, **more})  # type: ignore[arg-type]
    assert (found == []) if says is None else (says in " ".join(found))


def test_the_tolerance_follows_float32s_own_error() -> None:
    exact = np.random.default_rng(0).normal(size=(50, 8)) * 0.05
    single = exact + 1e-6 * 0.05
    allowed = verdict.tolerance(single, exact)
    assert allowed == pytest.approx(10e-6, rel=0.2)
    assert verdict.relative_error(exact * 1.02, exact) > 100 * allowed  # small numbers hide no error of 2%
    assert verdict.tolerance(exact, exact) == verdict.FLOOR
    broken = exact.copy()
    broken[3, 3] = np.nan
    assert verdict.relative_error(broken, exact) == math.inf
    assert verdict.relative_error(exact[:3], exact) == math.inf


def test_neighbours_of_the_same_and_of_other_vectors() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 8))
    same = verdict.neighbours(vectors, vectors)
    assert same is not None and same.spearman == pytest.approx(1) and same.top10_overlap == 1
    other = verdict.neighbours(np.random.default_rng(1).normal(size=(40, 8)), vectors)
    assert other is not None and other.spearman < 0.5 and other.top10_overlap < 0.6
    alike = verdict.neighbours(vectors, vectors * 0.001 + 1)
    assert alike is not None and alike.median_cosine > 0.99
    assert verdict.neighbours(vectors[:2], vectors[:2]) is None
