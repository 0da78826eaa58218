"""What the threads of one ``infer`` call and the engine's loop hand to each other, under one lock."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from pipeline.engines.base import ResultBatch, RowFailure
from pipeline.engines.vllm.prompts.prompts import Prompt
from pipeline.engines.vllm.requests.admission import AdmissionLimit
from pipeline.engines.vllm.requests.outcome import Outcome
from pipeline.engines.vllm.requests.waiting import WaitingPrompts

MOST_GIVEN = 2
"""Batches of results from elsewhere that wait for the reading thread."""


class Exchange:
    """Prompts go in by :meth:`offer`, to the engine by :meth:`next_prompts`; outcomes come back by :meth:`complete`
    and leave by :meth:`take`. Each method may be called in any thread, and holds the lock of ``window`` for its work.

    ``work`` names what calls that take turns share (see :class:`AdmissionLimit`).
    """

    def __init__(self, window: AdmissionLimit, work: str, waiting: WaitingPrompts) -> None:
        self._window, self._changed = window, window.changed
        self._ticket = window.join(work)
        self._waiting = waiting
        self._finished: list[Outcome] = []
        self._given: list[ResultBatch] = []
        self._stopped = False
        self._error: BaseException | None = None

    @property
    def stopped(self) -> bool:
        return self._stopped

    # ---- the thread that makes prompts ----

    def offer(self, prompts: Sequence[Prompt], failures: Sequence[RowFailure]) -> bool:
        """Take prompts in, waiting while too much waits already. False when the call has been stopped."""
        keys = [array("i", prompt.tokens).tobytes() for prompt in prompts]
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not (self._waiting.full or self._piled_up()))
            if self._stopped:
                return False
            self._finished += failures
            self._finished += self._waiting.add(prompts, keys)
            self._notify()
        return True

    def give(self, batch: ResultBatch) -> bool:
        """Results that need not be computed, to be read with the others. Waits and returns as :meth:`offer` does."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._given) < MOST_GIVEN)
            if not self._stopped:
                self._given.append(batch)
                self._notify()
            return not self._stopped

    def end_offering(self, error: BaseException | None = None) -> None:
        """No more prompts will come; ``error`` if that is because reading them failed."""
        with self._changed:
            self._waiting.end()
            self._error = self._error or error
            self._notify()

    # ---- the feeding thread ----

    def next_prompts(self) -> list[Prompt]:
        """The prompts to put into the engine now, counted as inside. Waits until there are some; none when no more
        will come, or the call has been stopped or failed."""
        with self._changed:
            while not (self._stopped or self._error or self._waiting.over or self._startable()):
                self._changed.wait(self._waiting.patience())
            count = self._startable()
            if self._stopped or self._error or not count:
                return []
            some = self._waiting.pop(count, self._window.tokens_left())
            self._ticket.inside += len(some)
            self._ticket.tokens += sum(len(prompt.tokens) for prompt in some)
            self._notify()
            return some

    # ---- the engine's loop ----

    def media_made(self, prompt: Prompt) -> None:
        """What the prompt's media were made of is let go, so that more prompts may wait."""
        with self._changed:
            self._waiting.media_made(prompt)
            self._notify()

    def complete(self, outcomes: Sequence[tuple[Prompt, Outcome]]) -> None:
        """These prompts are no longer inside."""
        with self._changed:
            for prompt, outcome in outcomes:
                self._ticket.inside -= 1
                self._ticket.tokens -= len(prompt.tokens)
                self._finished.append(outcome)
                self._finished += self._waiting.finish(prompt, outcome)
            self._notify()

    def fail(self, make_error: Callable[[], BaseException]) -> None:
        """End the call with this error, unless it has ended. ``make_error`` may wait: it is called without the lock."""
        if self._error is None and not self._stopped:
            error = make_error()
            with self._changed:
                self._error = self._error or error
                self._notify()

    # ---- the thread that reads results ----

    def take(self) -> tuple[list[ResultBatch], list[Outcome]]:
        """What was given and what has finished, waiting until there is something; nothing when the call is over.

        Raises what ended the call, once everything that had finished before it has been taken.
        """
        with self._changed:
            self._changed.wait_for(self._has_something)
            # What has finished is done, even if the call was stopped or the engine died right after it.
            done = self._finished or self._given
            if self._error is not None and not (done or self._stopped):
                raise self._error
            given, self._given = self._given, []
            finished, self._finished = self._finished, []
            self._notify()
        return given, finished

    # ---- any thread ----

    def stop(self) -> bool:
        """End every wait. False when that was done before."""
        with self._changed:
            if self._stopped:
                return False
            self._stopped = True
            self._notify()
            return True

    def leave(self) -> None:
        """Nothing of this call is inside the engine any more: others need not count it."""
        self._window.leave(self._ticket)

    # ---- under the lock ----

    def _notify(self) -> None:
        """Something changed: whether this call has more to give, too."""
        self._ticket.ready = self._ready()
        self._changed.notify_all()

    def _ready(self) -> bool:
        """Whether this call has something to give now; if not, others need not wait for it."""
        ended = self._stopped or self._error is not None
        return bool(len(self._waiting)) and not ended and not self._piled_up() and self._waiting.patience() is None

    def _piled_up(self) -> bool:
        # A reader that is busy elsewhere (flushing a file) must not stop the engine, nor let results pile up for ever.
        return len(self._finished) >= 8 * self._window.requests

    def _startable(self) -> int:
        """How many requests to start now."""
        self._ticket.ready = self._ready()
        if not self._ticket.ready:
            return 0
        room = min(self._window.room(self._ticket), len(self._waiting))
        # Not one by one as requests finish: an eighth of the window at a time keeps the engine just as busy.
        least = min(max(1, self._window.requests // 8), len(self._waiting))
        return room if room >= least else 0

    def _has_something(self) -> bool:
        over = self._waiting.over and not self._ticket.inside
        return bool(self._finished or self._given or self._stopped or self._error or over)
