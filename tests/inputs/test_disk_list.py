"""A list on disk is a list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.inputs.disk_list import _PAGE, DiskBackedList


@given(st.integers(0, 3 * _PAGE), st.integers(0, 3 * _PAGE))
def test_a_spool_is_a_list(count: int, also: int) -> None:
    items = [(n, "x" * (n % 7)) for n in range(count)]
    spool = DiskBackedList(items)
    assert len(spool) == count
    assert list(spool) == items == list(spool)
    for index in {0, count // 2, count - 1, -1} if count else ():
        assert spool[index] == items[index]
    assert (spool == DiskBackedList(range(also))) == (count == also == 0)
    assert spool == DiskBackedList(items)


def test_it_can_grow_while_it_is_read() -> None:
    spool = DiskBackedList(range(2 * _PAGE))
    for item in spool:
        if item < _PAGE:
            spool.append(2 * _PAGE + item)
    assert list(spool) == list(range(3 * _PAGE))
