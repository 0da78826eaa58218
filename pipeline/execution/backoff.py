"""How long to wait before the next try. Pure: the random number is an argument."""

from __future__ import annotations

from storage.records import LONGEST_BACKOFF_SECONDS

BASE_SECONDS = 1.0


def backoff(failures: int, jitter: float, *, base: float = BASE_SECONDS, cap: float = LONGEST_BACKOFF_SECONDS) -> float:
    """Seconds to wait after the ``failures``-th failure (1 is the first).

    Exponential with a cap, and spread over its upper half by ``jitter`` in [0, 1), so that shards that failed together
    do not come back together.
    """
    full = min(cap, base * 2.0 ** min(failures - 1, 60))
    return float(full * (0.5 + 0.5 * jitter))
