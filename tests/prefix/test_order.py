"""The order in which prompts run: nothing lost, what is shared kept together, the longest answers first."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from pipeline.prefix.order import Backlog, Lengths, order, shared

BLOCK = 2
# Few letters and short texts, so that much is shared.
KEYS = st.lists(st.text("ab", max_size=9).map(str.encode), max_size=24)


@given(st.binary(max_size=12), st.binary(max_size=12), st.integers(1, 4))
def test_shared_is_whole_blocks_and_the_most_there_are(left: bytes, right: bytes, block: int) -> None:
    n = shared(left, right, block)
    assert n % block == 0
    assert left[:n] == right[:n]
    assert left[: n + block] != right[: n + block] or len(left) < n + block or len(right) < n + block


@given(KEYS, st.data())
def test_every_row_once_and_clusters_stay_together(keys: list[bytes], data: st.DataObject) -> None:
    expected = data.draw(st.lists(st.integers(0, 3), min_size=len(keys), max_size=len(keys)))
    found = order(keys, expected, BLOCK)
    assert sorted(found) == list(range(len(keys)))
    # At every depth of the prefix tree: rows that share so many blocks are neighbours, so each prefix is met once.
    for blocks in range(1, 5):
        deep = [row for row in found if len(keys[row]) >= blocks * BLOCK]
        whole = [keys[row][: blocks * BLOCK] for row in deep]
        assert len([prefix for prefix, _ in groupby(whole)]) == len(set(whole))


@given(KEYS, st.data())
def test_longest_first_among_those_that_share_nothing_more(keys: list[bytes], data: st.DataObject) -> None:
    expected = data.draw(st.lists(st.integers(0, 3), min_size=len(keys), max_size=len(keys)))
    for _, alike in groupby(order(keys, expected, BLOCK), key=lambda row: keys[row]):
        rows = list(alike)
        assert rows == sorted(rows, key=lambda row: (-expected[row], row))
    assert order(keys, expected, 0) == sorted(range(len(keys)), key=lambda row: (-expected[row], row))


def test_input_order_where_nothing_is_known() -> None:
    keys = [b"zz1", b"aa2", b"mm3"]
    assert order(keys, [1, 1, 1], BLOCK) == [0, 1, 2]


def test_what_is_in_the_cache_goes_first() -> None:
    keys = [b"aaaa", b"bbbb", b"bbbc"]
    assert order(keys, [9, 1, 1], BLOCK) == [0, 1, 2]
    assert order(keys, [9, 1, 1], BLOCK, after=b"bbzz") == [1, 2, 0]


def test_rows_that_share_little_do_not_part_those_that_share_much() -> None:
    # Two leaves, "aabbcc" and "aaddee", below the prefix "aa"; "aazz" ends at it, and waits however long it may be.
    keys = [b"aabbcc1", b"aaddee1", b"aabbcc2", b"aazz", b"aaddee2"]
    assert order(keys, [1, 1, 2, 9, 2], BLOCK) == [2, 0, 4, 1, 3]


@given(st.lists(st.one_of(st.integers(1, 5), st.text("ab", min_size=1, max_size=6).map(str.encode)), max_size=60))
def test_a_backlog_gives_back_what_it_was_given(actions: list[int | bytes]) -> None:
    for backlog in (Backlog[int](), Backlog[int](BLOCK, lambda key, item: len(key))):
        pushed: list[bytes] = []
        popped: list[int] = []
        for action in actions:
            if isinstance(action, bytes):
                backlog.push(action, len(pushed))
                pushed.append(action)
            else:
                popped += backlog.pop(action)
            assert len(backlog) == len(pushed) - len(popped)
            waiting = set(range(len(pushed))) - set(popped)
            assert backlog.n_bytes == sum(len(pushed[item]) for item in waiting)
        popped += backlog.pop(10**9)
        assert sorted(popped) == list(range(len(pushed)))
        if not backlog.orders:
            assert popped == sorted(popped)


def test_a_backlog_goes_on_with_the_prefix_it_was_at() -> None:
    backlog = Backlog[str](BLOCK, lambda key, item: 0)
    for text in ("aa1", "bb1", "aa2"):
        backlog.push(text.encode(), text)
    assert backlog.pop(1) == ["aa1"]
    for text in ("bb2", "cc1", "aa3"):
        backlog.push(text.encode(), text)
    assert backlog.pop(9) == ["aa2", "aa3", "bb1", "bb2", "cc1"]


def test_lengths_are_learnt() -> None:
    lengths = Lengths(limit=64)
    assert lengths.expect(10) == 64
    for _ in range(100):
        lengths.observe(10, 8)
        lengths.observe(1000, 200)
    assert 8 <= lengths.expect(10) < 16 < 150 < lengths.expect(1000) <= 200
    assert lengths.grade(10) < lengths.grade(1000)
    assert lengths.grade(1000, 8) < lengths.grade(10) == lengths.grade(10, 1000)
    # One token more or less is not worth another order.
    steady = Lengths(limit=64)
    for prompt, made in ((10, 40), (1000, 41)):
        for _ in range(20):
            steady.observe(prompt, made)
    assert steady.grade(10) == steady.grade(1000)


@given(st.integers(1, 10**6), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=20))
def test_expectations_stay_between_what_was_seen(prompt: int, seen: list[tuple[int, int]]) -> None:
    lengths = Lengths(limit=16)
    for tokens, made in seen:
        lengths.observe(tokens, made)
    made = [made for _, made in seen] or [16]
    assert min(made) - 1e-6 <= lengths.expect(prompt) <= max(made) + 1e-6
