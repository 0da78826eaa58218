"""A list that lies in a temporary file: written once, read as often as needed, a page of it in memory."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_PAGE = 256


class DiskBackedList(Generic[T]):
    """Items in the order in which they were added. Plain data only; the file goes with the object."""

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._file = tempfile.TemporaryFile(prefix="rowmill-spool-")  # noqa: SIM115 - lives as long as the object
        self._pages: list[int] = []
        self._tail: list[T] = []
        for item in items:
            self.append(item)

    def append(self, item: T) -> None:
        self._tail.append(item)
        if len(self._tail) == _PAGE:
            self._pages.append(self._file.seek(0, 2))
            pickle.dump(self._tail, self._file, pickle.HIGHEST_PROTOCOL)
            self._tail = []

    def __len__(self) -> int:
        return len(self._pages) * _PAGE + len(self._tail)

    def __iter__(self) -> Iterator[T]:
        for number in range(len(self._pages)):
            yield from self._page(number)
        yield from self._tail

    def __getitem__(self, index: int) -> T:
        at = range(len(self))[index]
        page, within = divmod(at, _PAGE)
        return self._page(page)[within] if page < len(self._pages) else self._tail[within]

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, DiskBackedList):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _page(self, number: int) -> list[T]:
        self._file.seek(self._pages[number])
        page: list[T] = pickle.load(self._file)  # noqa: S301 - our own file, which nobody else can open
        return page
