"""Named points where a test may end the process, raise, or wait. Nothing is armed outside tests.

A fault test starts a real process whose script arms a point before it calls Rowmill:
``failpoints.arm("flush.stored", lambda: os._exit(137))``.
"""

from __future__ import annotations

from collections.abc import Callable

POINTS = {
    "plan.claimed": "a planner of a fleet has its lease; nothing was read yet",
    "plan.prepared": "the input was read; neither the job nor its shards are stored yet",
    "submit.inserted": "the job is stored; its output does not know yet whose it is",
    "plan.sampled": "regrouping by prefix: it is decided where to cut; nothing was copied",
    "plan.spilled": "regrouping by prefix: every row lies in the temporary file; no chunk is written",
    "plan.chunk": "regrouping by prefix: one more chunk is written; the database does not know of it",
    "fire.decided": "the fire is recorded as pending; it has no job yet",
    "fire.inserted": "in one transaction: the job is inserted, the fire is not marked as submitted yet",
    "fire.submitted": "the job and its fire are committed; nobody knows of them yet",
    "claim.taken": "the claim is committed; no row was read yet",
    "flush.stored": "a part file is stored and verified; the database does not know of it",
    "flush.recorded": "the flush is committed",
    "cache.stored": "answers are kept for later jobs; their shard is not committed",
    "commit.assembled": "the shard's output is stored and verified; the commit has not begun",
    "commit.done": "the commit is committed; the worker does not know what comes next",
    "finalize.claimed": "the finalizer has its epoch; nothing was published",
    "finalize.publishing": "the database knows that the job publishes; nothing was deleted or published",
    "finalize.part": "one more part file is published",
    "finalize.manifest": "every part is published, the manifest is not",
    "finalize.put": "the finalizer has looked at its lease for the last time before it puts the manifest",
    "finalize.success": "the manifest is published, _SUCCESS is not",
    "finalize.complete": "everything is published; the job is not completed yet",
    "delete.marked": "an ended job is marked as deleted; its files and rows are there",
    "garbage.given_up": "the part files of an ended job are forgotten; none is deleted",
}
"""Every point, and what is true when it is hit."""

_armed: dict[str, Callable[[], object]] = {}


def hit(name: str) -> None:
    """Do what was armed at ``name``; usually nothing."""
    action = _armed.get(name)
    if action is not None:
        action()


def arm(name: str, action: Callable[[], object]) -> None:
    """Call ``action`` whenever ``name`` is hit. For tests. Raises ``KeyError`` for a name that does not exist."""
    if name not in POINTS:
        raise KeyError(f"there is no failpoint {name!r}; there are {', '.join(POINTS)}")
    _armed[name] = action


def disarm() -> None:
    """Take back everything that was armed."""
    _armed.clear()
