"""Finding the row that kills the engine: run the rows of a shard in ever smaller groups until it stands alone. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from pyroaring import BitMap

PIECES = 8
"""Groups that a suspect set is cut into: a shard of 50,000 rows takes five more crashes to find its poison row."""


class Kind(StrEnum):
    TOGETHER = "together"
    """Run as ever."""
    ALONE = "alone"
    """Note the rows as suspects, run them, flush them; only then go on."""
    POISON = "poison"
    """One row that was alone when the engine died: do not run it again."""


@dataclass(frozen=True, slots=True)
class Round:
    """Rows (indices within the shard) to run in one call of the engine."""

    rows: BitMap
    kind: Kind


def rounds(todo: BitMap, *, searching: bool, suspect: BitMap | None, futile: int = 0) -> Iterator[Round]:
    """How to run ``todo``. Every row is in exactly one round.

    While ``searching``, the suspects (the rows that ran alone when the engine died last; all rows, if none did) come
    first, in pieces; a single one is the poison. The others follow together. Poison rows may stand side by side, so
    each search begins with another piece: ``futile`` counts those in a row in which no row was computed.
    """
    if not searching:
        yield Round(todo, Kind.TOGETHER)
        return
    suspects = todo if suspect is None else suspect & todo
    if suspect is not None and len(suspects) == 1:
        yield Round(suspects, Kind.POISON)
    else:
        pieces = np.array_split(np.array(suspects.to_array(), dtype=np.uint32), min(PIECES, len(suspects)) or 1)
        first = futile % len(pieces)
        for piece in pieces[first:] + pieces[:first]:
            if len(piece):
                yield Round(BitMap(piece), Kind.ALONE)
    if rest := todo - suspects:
        yield Round(rest, Kind.TOGETHER)
