"""What the death of an attempt costs its shard, and whether its rows are to blame. Pure.

An attempt notes what it is at before it does it, because a process that dies leaves no message. Only rows that were
inside an engine can be to blame. Every other death counts against the budget of losses.

A shard has three counters; a retry of the job begins all of them at 0.

=========== ================================= ================================= =====================================
Counter     Counts                            Bound                             Goes back to 0
=========== ================================= ================================= =====================================
``n_fail``  attempts that ended with an       ``max_failures``                  never
            error; engines that died under
            rows, before a search and with
            nothing flushed
``n_lost``  attempts whose process died or    ``max_losses``; one more while    at the next death of an attempt
            whose lease ran out (not while    a search goes on                  that had flushed a computed row
            waiting, nor with isolated rows
            inside); searches that begin
``n_crash`` deaths of engine or process with  ``CAREFUL_AFTER`` begins the      with a flush, while it is below
            rows inside                       search, ``MOST_CRASHES`` fails    ``CAREFUL_AFTER - 1``; before a
                                              the shard                         search also when an attempt is lost
                                                                                that had flushed a computed row
=========== ================================= ================================= =====================================

``FailureCounts`` holds the last two; ``storage.queue.attempts`` counts ``n_fail``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

CAREFUL_AFTER = 3
"""Crashes in a row without progress after which a shard's rows are run in ever smaller groups."""
MOST_CRASHES = 20
"""Crashes after which a shard fails, however small the groups."""


class Step(StrEnum):
    """What an attempt is at."""

    LOADING = "loading"
    IDLE = "idle"
    COMPUTING = "computing"
    WAITING = "waiting"
    FINISHING = "finishing"

    @property
    def phrase(self) -> str:
        """For messages: after "its worker died"."""
        return _PHRASES[self]


_PHRASES = {
    Step.LOADING: "while loading the engine",
    Step.IDLE: "while no row was in the engine (before or between rows, or while reading the input)",
    Step.COMPUTING: "while rows were in the engine",
    Step.WAITING: "while waiting for another shard of the same worker",
    Step.FINISHING: "after the last row, while assembling the output",
}


@dataclass(frozen=True, slots=True)
class FailureCounts:
    """A shard's counters afterwards. ``opens``: a search for a poison row begins, among all rows that are left."""

    crashes: int
    losses: int
    opens: bool = False

    def is_spent(self, max_losses: int) -> bool:
        """Whether the shard fails. The last loss that is allowed may begin a search, which has its own."""
        return self.crashes >= MOST_CRASHES or self.losses >= max_losses + (self.crashes >= CAREFUL_AFTER)


def after_crash(crashes: int, losses: int, *, progress: bool, alone: bool) -> FailureCounts:
    """The engine, or the whole process, died with rows inside. ``alone``: the rows that were inside are known.

    A crash that narrows the search costs no loss. ``progress``: the attempt had flushed a row that was computed.
    """
    crashes += 1
    opens = crashes >= CAREFUL_AFTER and not alone and not progress
    losses = 0 if progress else losses if alone else losses + 1
    return FailureCounts(crashes, losses, opens)


def after_loss(step: Step, crashes: int, losses: int, *, progress: bool, alone: bool) -> FailureCounts:
    """The process died at ``step``, or its lease ran out.

    Progress makes up for it: a shard that is flushed a little further each time gets through, however often its worker
    dies. Whoever waits for another shard dies of that one.
    """
    if step is Step.WAITING:
        return FailureCounts(crashes, losses)
    searching = crashes >= CAREFUL_AFTER
    if progress and not searching:
        return FailureCounts(0, 0)
    if step is Step.COMPUTING:
        return after_crash(crashes, losses, progress=progress, alone=alone)
    return FailureCounts(crashes, 0 if progress else losses + 1)
