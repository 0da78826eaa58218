"""The search for a poison row, against a world in which some rows kill whatever runs them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from pipeline.execution.poison_search import PIECES, Kind, rounds


@given(
    st.sets(st.integers(0, 200), min_size=1),
    st.booleans(),
    st.one_of(st.none(), st.sets(st.integers(0, 200))),
    st.integers(0, 20),
)
def test_every_row_is_in_exactly_one_round(
    todo: set[int], searching: bool, suspect: set[int] | None, futile: int
) -> None:
    suspects = None if suspect is None else BitMap(suspect)
    found = list(rounds(BitMap(todo), searching=searching, suspect=suspects, futile=futile))
    rows = [row for turn in found for row in turn.rows]
    assert sorted(rows) == sorted(todo)
    if not searching:
        assert [turn.kind for turn in found] == [Kind.TOGETHER]


@given(st.integers(1, 3000), st.data())
def test_the_search_ends_with_just_the_poison_rows(n: int, data: st.DataObject) -> None:
    poison = data.draw(st.sets(st.integers(0, n - 1), max_size=3))
    futile = data.draw(st.integers(0, 20))
    todo, found, suspect, crashes, searching = BitMap(range(n)), set[int](), None, 0, False
    while todo:
        for turn in rounds(BitMap(todo), searching=searching, suspect=suspect, futile=futile):
            suspect = turn.rows if turn.kind is Kind.ALONE else None
            if turn.kind is Kind.POISON:
                found |= set(turn.rows)
            elif poison & set(turn.rows):
                crashes += 1
                searching = True
                break
            todo -= turn.rows
    assert found == poison
    # One crash to notice each poison row, then one for each division by eight: log8(3000) rounds up to 4.
    assert crashes <= len(poison) * 6


@given(st.integers(PIECES, 300), st.data())
def test_poison_rows_side_by_side_do_not_hide_that_others_are_computed(n: int, data: st.DataObject) -> None:
    """Wherever they stand: one of as many searches as there are pieces begins with rows that the engine computes."""
    first = data.draw(st.integers(0, n - 1))
    poison = BitMap(range(first, min(n, first + n // 2)))
    begins = [next(rounds(BitMap(range(n)), searching=True, suspect=None, futile=k)) for k in range(PIECES)]
    assert any(not turn.rows & poison for turn in begins)
