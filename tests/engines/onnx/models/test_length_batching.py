from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engines.onnx.models.length_batching import batches_by_length

lengths = st.lists(st.integers(0, 600), max_size=300)


@settings(deadline=None)  # a busy machine is no failure
@given(lengths, st.integers(1, 2000), st.none() | st.integers(1, 64))
def test_every_row_is_in_exactly_one_batch(sizes: list[int], budget: int, max_rows: int | None) -> None:
    batches = batches_by_length(sizes, budget, max_rows)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(sizes)))
    assert all(len(batch) > 0 for batch in batches)


@settings(deadline=None)  # a busy machine is no failure
@given(lengths, st.integers(1, 2000), st.none() | st.integers(1, 64))
def test_no_batch_exceeds_the_budget_unless_a_single_row_does(
    sizes: list[int], budget: int, max_rows: int | None
) -> None:
    for batch in batches_by_length(sizes, budget, max_rows):
        padded = len(batch) * max(sizes[i] for i in batch)
        assert padded <= budget or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows


@settings(deadline=None)  # a busy machine is no failure
@given(lengths, st.integers(1, 2000))
def test_batches_are_full_and_come_longest_first(sizes: list[int], budget: int) -> None:
    batches = batches_by_length(sizes, budget)
    flat = [sizes[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * max(1, max(sizes[i] for i in batch)) > budget


def test_equal_lengths_keep_their_order() -> None:
    assert [batch.tolist() for batch in batches_by_length([5, 9, 5, 5, 9], 15)] == [[1], [4], [0, 2, 3]]


def test_the_result_is_int64_whatever_the_input() -> None:
    assert all(batch.dtype == np.int64 for batch in batches_by_length(np.array([3, 1], dtype=np.int16), 4))
    assert batches_by_length([], 4) == []


@pytest.mark.parametrize(("budget", "max_rows"), [(0, None), (8, 0)])
def test_a_budget_that_fits_nothing_is_refused(budget: int, max_rows: int | None) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        batches_by_length([1, 2], budget, max_rows)
