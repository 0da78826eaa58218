"""What a death costs: every one is under a budget, and only rows inside an engine are to blame."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.deaths import CAREFUL_AFTER, MOST_CRASHES, FailureCounts, Step, after_loss

STEPS = st.sampled_from([step for step in Step if step is not Step.WAITING])


@given(st.integers(1, 20), st.lists(st.tuples(STEPS, st.booleans()), min_size=200, max_size=200))
def test_deaths_without_progress_come_to_an_end(max_losses: int, deaths: list[tuple[Step, bool]]) -> None:
    """Whatever the attempts were at; rows run alone only in a search. Each conviction begins the search again."""
    toll = FailureCounts(0, 0)
    for count, (step, alone) in enumerate(deaths):
        searching = toll.crashes >= CAREFUL_AFTER
        toll = after_loss(step, toll.crashes, toll.losses, progress=False, alone=alone and searching)
        if toll.is_spent(max_losses):
            assert toll.crashes >= MOST_CRASHES or toll.losses >= max_losses
            assert count < MOST_CRASHES + max_losses + 1
            return
    raise AssertionError("no end after 200 deaths")


@given(STEPS, st.integers(0, CAREFUL_AFTER - 1), st.integers(0, 100), st.booleans())
def test_progress_makes_up_for_a_death(step: Step, crashes: int, losses: int, alone: bool) -> None:
    assert after_loss(step, crashes, losses, progress=True, alone=alone) == FailureCounts(0, 0)


@given(st.integers(0, MOST_CRASHES), st.integers(0, 100), st.booleans(), st.booleans())
def test_whoever_waits_for_another_shard_dies_of_that_one(
    crashes: int, losses: int, progress: bool, alone: bool
) -> None:
    assert after_loss(Step.WAITING, crashes, losses, progress=progress, alone=alone) == FailureCounts(crashes, losses)


@pytest.mark.parametrize("step", [Step.LOADING, Step.IDLE, Step.FINISHING])
def test_a_death_with_no_row_inside_is_no_crash(step: Step) -> None:
    toll = FailureCounts(0, 0)
    for number in range(1, 4):
        toll = after_loss(step, toll.crashes, toll.losses, progress=False, alone=False)
        assert toll == FailureCounts(0, number)
    assert [toll.is_spent(budget) for budget in (3, 4)] == [True, False]


def test_a_search_begins_with_the_last_loss_and_costs_none() -> None:
    toll = FailureCounts(0, 0)
    for _ in range(CAREFUL_AFTER):
        toll = after_loss(Step.COMPUTING, toll.crashes, toll.losses, progress=False, alone=False)
    assert toll == FailureCounts(3, 3, opens=True)
    assert not toll.is_spent(3)
    narrowed = after_loss(Step.COMPUTING, toll.crashes, toll.losses, progress=False, alone=True)
    assert narrowed == FailureCounts(4, 3)
    assert not narrowed.is_spent(4)


def test_every_step_has_words() -> None:
    assert all(step.phrase for step in Step)
