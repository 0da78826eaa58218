"""Finding the row that kills the engine: run the rows of a shard in ever smaller groups until it stands alone. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from pyroaring import BitMap

PIECES = 8
"""Groups that a suspect set is cut into: a shard of 50,000 rows takes five more crashes to find its poison row."""


class Mode(StrEnum):
    NORMAL = "normal"
    """Run while other shards run."""
    ISOLATED = "isolated"
    """Note the rows as suspects, run them with nothing else inside the engine, flush them; only then go on."""
    QUARANTINE = "quarantine"
    """One row that was isolated when the engine died: do not run it again."""


@dataclass(frozen=True, slots=True)
class SearchStep:
    """Rows (indices within the shard) to run in one call of the engine."""

    rows: BitMap
    mode: Mode


def search_steps(todo: BitMap, *, searching: bool, suspect: BitMap | None, futile: int = 0) -> Iterator[SearchStep]:
    """How to run ``todo``. Every row is in exactly one step.

    While ``searching``, the suspects (the rows that were isolated when the engine died last; all rows, if none were)
    come first, in pieces; a single one is the poison. The others follow in one step. Poison rows may be neighbours, so
    each search begins with another piece. ``futile`` is the number of consecutive searches in which no row was
    computed; it chooses the piece to begin with.
    """
    if not searching:
        yield SearchStep(todo, Mode.NORMAL)
        return
    suspects = todo if suspect is None else suspect & todo
    if suspect is not None and len(suspects) == 1:
        yield SearchStep(suspects, Mode.QUARANTINE)
    else:
        pieces = np.array_split(np.array(suspects.to_array(), dtype=np.uint32), min(PIECES, len(suspects)) or 1)
        first = futile % len(pieces)
        for piece in pieces[first:] + pieces[:first]:
            if len(piece):
                yield SearchStep(BitMap(piece), Mode.ISOLATED)
    if rest := todo - suspects:
        yield SearchStep(rest, Mode.NORMAL)
