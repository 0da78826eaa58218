"""Keys of cached results, and where they are kept: pure pieces, against a dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.result_cache.index import ENTRY_BYTES, Index, split
from pipeline.result_cache.keys import namespace, row_key

HASHES = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=12)


@given(st.lists(st.tuples(HASHES, st.booleans()), max_size=6), HASHES)
def test_finds_what_a_dictionary_finds(steps: list[tuple[list[int], bool]], others: list[int]) -> None:
    index, kept = Index(), dict[int, list[int]]()
    for number, (hashes, forget) in enumerate(steps):
        gone = list(kept)[:1] if forget else []
        index = index.with_segments([(number, np.array(hashes, np.uint64))], gone)
        kept = {n: found for n, found in kept.items() if n not in gone} | {number: hashes}
    known = {(number, row): h for number, found in kept.items() for row, h in enumerate(found)}
    assert len(index) == len(known)
    wanted = [*others, *known.values()]
    numbers, rows = split(index.find(np.array(wanted, np.uint64)))
    for h, number, row in zip(wanted, numbers.tolist(), rows.tolist(), strict=True):
        if number < 0:
            assert h not in known.values()
        else:
            assert known[number, row] == h


def test_an_index_is_as_large_as_it_says() -> None:
    index = Index().with_segments([(0, np.arange(1000, dtype=np.uint64))])
    assert index._hashes.nbytes + index._offsets.nbytes == 1000 * ENTRY_BYTES


PARTS = st.lists(st.binary(max_size=6), max_size=4)


@given(PARTS, PARTS)
def test_a_key_tells_parts_apart_and_where_they_end(one: list[bytes], other: list[bytes]) -> None:
    assert len(row_key(*one)) == 32
    assert (row_key(*one) == row_key(*other)) == (one == other)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4))
def test_a_namespace_depends_on_facts_and_not_on_their_order(facts: dict[str, object]) -> None:
    assert namespace(facts) == namespace(dict(reversed(facts.items())))
    assert namespace(facts) != namespace({**facts, "one more": 1})
    schemas = [{"form": {"properties": {key: {} for key in names}}} for names in ("ab", "ba")]
    assert namespace(schemas[0]) != namespace(schemas[1])
