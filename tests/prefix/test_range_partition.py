"""Which rows belong together: every row somewhere, what begins alike in one place, and the sizes about right."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.prefix.range_partition import FILL, Sample, partition_of, separators

KEYS = st.lists(st.text("ab", max_size=6).map(str.encode), max_size=60)


@given(KEYS, st.lists(st.integers(0, 60), max_size=4), st.integers(1, 40), st.integers(0, 100))
def test_a_sample_is_the_same_however_the_stream_is_cut(
    keys: list[bytes], cuts: list[int], most: int, n_bytes: int
) -> None:
    whole, pieces = Sample(n_bytes, most), Sample(n_bytes, most)
    whole.add(keys)
    at = 0
    for cut in [*sorted(cuts), len(keys)]:
        pieces.add(keys[at:cut])
        at = max(at, cut)
    assert whole.sorted() == pieces.sorted()
    assert len(whole.sorted()) <= most
    assert len(whole.sorted()) <= 1 or sum(map(len, whole.sorted())) <= n_bytes
    assert not Counter(whole.sorted()) - Counter(keys)


def test_a_sample_that_fits_is_all() -> None:
    sample = Sample(1000, 100)
    sample.add([b"b", b"a", b"b"])
    assert sample.sorted() == [b"a", b"b", b"b"]


@given(KEYS, st.floats(0.001, 1))
def test_cuts_part_the_keys_in_their_order(keys: list[bytes], share: float) -> None:
    keys = sorted(keys)
    cuts = separators(keys, share)
    assert cuts == sorted(set(cuts))
    found = partition_of(keys, cuts)
    assert found == sorted(found)  # a stretch of the sorted keys each; the same key is always in the same partition
    assert set(found) == set(range(len(cuts) + 1)) or not keys


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 30))
def test_what_begins_alike_stays_together_where_it_fits(groups: int, size: int, most: int) -> None:
    keys = sorted(f"{group:02d}-{row:03d}".encode() for group in range(groups) for row in range(size))
    share = FILL * most / len(keys)
    found = partition_of(keys, separators(keys, share))
    sizes = Counter(found)
    assert max(sizes.values()) <= max(1, round(1.25 * max(1.0, share * len(keys)))) + 1
    if size <= 0.25 * FILL * most:  # a boundary between two groups lies within every window
        for group in range(groups):
            assert len({found[group * size + row] for row in range(size)}) == 1


def test_one_beginning_too_large_for_a_partition_does_not_take_others_along() -> None:
    keys = sorted([b"same"] * 50 + [f"x{n:02d}".encode() for n in range(10)])
    found = partition_of(keys, separators(keys, 5 / 60))
    assert len(set(found[:50])) == 1
    assert found[49] not in found[50:]
