"""The search for a poison row, against a world in which some rows kill whatever runs them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from pipeline.execution.poison_search import PIECES, Mode, search_steps


@given(
    st.sets(st.integers(0, 200), min_size=1),
    st.booleans(),
    st.one_of(st.none(), st.sets(st.integers(0, 200))),
    st.integers(0, 20),
)
def test_every_row_is_in_exactly_one_step(
    todo: set[int], searching: bool, suspect: set[int] | None, futile: int
) -> None:
    suspects = None if suspect is None else BitMap(suspect)
    found = list(search_steps(BitMap(todo), searching=searching, suspect=suspects, futile=futile))
    rows = [row for step in found for row in step.rows]
    assert sorted(rows) == sorted(todo)
    if not searching:
        assert [step.mode for step in found] == [Mode.NORMAL]


@given(st.integers(1, 3000), st.data())
def test_the_search_ends_with_just_the_poison_rows(n: int, data: st.DataObject) -> None:
    poison = data.draw(st.sets(st.integers(0, n - 1), max_size=3))
    futile = data.draw(st.integers(0, 20))
    todo, found, suspect, crashes, searching = BitMap(range(n)), set[int](), None, 0, False
    while todo:
        for step in search_steps(BitMap(todo), searching=searching, suspect=suspect, futile=futile):
            suspect = step.rows if step.mode is Mode.ISOLATED else None
            if step.mode is Mode.QUARANTINE:
                found |= set(step.rows)
            elif poison & set(step.rows):
                crashes += 1
                searching = True
                break
            todo -= step.rows
    assert found == poison
    # One crash to notice each poison row, then one for each division by eight: log8(3000) rounds up to 4.
    assert crashes <= len(poison) * 6


@given(st.integers(PIECES, 300), st.data())
def test_poison_rows_side_by_side_do_not_hide_that_others_are_computed(n: int, data: st.DataObject) -> None:
    """Wherever they stand: one of as many searches as there are pieces begins with rows that the engine computes."""
    first = data.draw(st.integers(0, n - 1))
    poison = BitMap(range(first, min(n, first + n // 2)))
    begins = [next(search_steps(BitMap(range(n)), searching=True, suspect=None, futile=k)) for k in range(PIECES)]
    assert any(not step.rows & poison for step in begins)
