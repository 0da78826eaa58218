"""The prompts of one call that wait to be put into the engine: their order, their limits, those that occur again."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.engines.base import RowFailure
from pipeline.engines.vllm.prompts.prompts import Prompt
from pipeline.engines.vllm.requests.dedup import DedupKey, RequestDedup
from pipeline.engines.vllm.requests.outcome import Finished, Outcome
from pipeline.prefix.order import Backlog, Lengths

TOKEN_BYTES = array("i").itemsize
BYTES_PER_TOKEN = 16
"""What a prompt that waits takes: its tokens as a list of Python integers, and as four bytes each, to sort by."""
FOLLOWER_BYTES = 300
"""What a row takes that waits for the answer to another row with the same prompt."""
SHARE_TO_ORDER = 4
"""Windows full of prompts that are gathered before the first is run, so that there is something to put in order."""
GATHER_SECONDS = 2.0
"""How long prompts may be gathered, to put them in order, while the engine stands idle."""


@dataclass(frozen=True, slots=True)
class WaitingLimits:
    """What may wait to be put into the engine: ``rows`` prompts, of ``n_bytes`` bytes in memory.

    ``whole``: as many are gathered before the first is run, however long that takes.
    """

    rows: int
    n_bytes: int
    whole: bool = False


class WaitingPrompts:
    """``backlog`` orders the prompts; ``lengths`` learns from what finishes. With ``dedup``, a prompt that occurs again
    is not run again, where ``dedup_key`` recognises it. ``gather``: prompts to have before the first is run, so that
    there is something to put in order.

    Callers hold a lock: it is not safe for several threads.
    """

    def __init__(
        self,
        backlog: Backlog[Prompt],
        limits: WaitingLimits,
        gather: int,
        *,
        lengths: Lengths,
        dedup: RequestDedup[Finished, Prompt] | None,
        dedup_key: DedupKey,
    ) -> None:
        self._backlog, self._limits = backlog, limits
        self._gather = (limits.rows if limits.whole else gather) if backlog.orders else 0
        self._lengths, self._dedup, self._dedup_key = lengths, dedup, dedup_key
        self._first_at: float | None = None
        self._unmade_bytes = 0
        self._ended = False

    def __len__(self) -> int:
        return len(self._backlog)

    @property
    def over(self) -> bool:
        """None waits and none will come."""
        return self._ended and not len(self._backlog)

    @property
    def full(self) -> bool:
        following = 0 if self._dedup is None else self._dedup.waiting
        n_bytes = BYTES_PER_TOKEN * self._backlog.n_bytes // TOKEN_BYTES + FOLLOWER_BYTES * following
        n_bytes += self._unmade_bytes
        return len(self._backlog) + following >= self._limits.rows or n_bytes >= self._limits.n_bytes

    def add(self, prompts: Sequence[Prompt], keys: Sequence[bytes]) -> list[Finished]:
        """Take prompts in; ``keys`` are the bytes of their tokens. Returns the answers that are known already."""
        known = []
        for prompt, key in zip(prompts, keys, strict=True):
            must_run, answer = self._admit(prompt, key)
            if answer is not None:
                known.append(answer)
            if must_run:
                self._backlog.push(key, prompt)
                self._unmade_bytes += prompt.make_bytes or 0
        if self._first_at is None and len(self._backlog):
            self._first_at = time.monotonic()
        return known

    def end(self) -> None:
        """No more prompts will come."""
        self._ended = True

    def patience(self) -> float | None:
        """Seconds to go on gathering prompts before the first is run; ``None``: no longer."""
        if self._ended or self.full or len(self._backlog) >= self._gather:
            self._gather = 0
        if not self._gather or self._first_at is None:
            return None
        if self._limits.whole:
            return GATHER_SECONDS  # then look again
        left = self._first_at + GATHER_SECONDS - time.monotonic()
        if left <= 0:
            self._gather = 0
            return None
        return left

    def pop(self, most: int, tokens: int) -> list[Prompt]:
        """The next prompts, until they have ``tokens`` tokens together; one in any case."""
        some: list[Prompt] = []
        while len(some) < most and (tokens > 0 or not some):
            some += self._backlog.pop(1)
            tokens -= len(some[-1].tokens)
        return some

    def media_made(self, prompt: Prompt) -> None:
        """What the prompt's media were made of is let go."""
        self._unmade_bytes -= prompt.make_bytes or 0

    def finish(self, prompt: Prompt, outcome: Outcome) -> list[Outcome]:
        """A prompt that was popped has its outcome. Returns those of the rows that wait for the same answer."""
        if isinstance(outcome, Finished):
            self._lengths.observe(len(prompt.tokens), outcome.completion_tokens)
        if self._dedup is None:
            return []
        if isinstance(outcome, RowFailure):
            return [replace(outcome, row=other.row) for other in self._dedup.finish(outcome.row, None, 0)]
        lasting = None if outcome.given_up else outcome
        followers = self._dedup.finish(outcome.prompt.row, lasting, outcome.n_bytes)
        return [outcome.for_row(other) for other in followers]

    def _admit(self, prompt: Prompt, key: bytes) -> tuple[bool, Finished | None]:
        same = None if self._dedup is None else self._dedup_key(prompt, key)
        if self._dedup is None or same is None:
            return True, None
        # What follows another row is not run: it needs no tokens.
        must_run, finished = self._dedup.admit(prompt.row, same, replace(prompt, tokens=[]))
        return must_run, None if finished is None else finished.for_row(prompt)
