"""The requests of one ``infer`` call: prompts taken in by one thread, put into vLLM by a second, read by a third.

One task per request in the engine's loop, woken once, when the request has finished. What finishes in one step of the
engine crosses to the reading thread together.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError as FutureCancelled
from dataclasses import dataclass, replace
from typing import Any

from pipeline.engines.base import ResultBatch, RowFailure
from pipeline.engines.vllm.process.output import STOP_SECONDS, first_lines
from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.engines.vllm.prompts.prompts import Prompt
from pipeline.engines.vllm.requests.admission import AdmissionLimit
from pipeline.engines.vllm.requests.dedup import DedupKey, RequestDedup
from pipeline.engines.vllm.requests.media_budget import MediaMemoryBudget
from pipeline.engines.vllm.requests.outcome import Finished, Outcome
from pipeline.prefix.order import Backlog, Lengths
from pipeline.spec.error_codes import MESSAGE_LIMIT, RowErrorCode, request_timed_out
from storage.errors import Blame, EngineDead, RowError, TransientError

TOKEN_BYTES = array("i").itemsize
BYTES_PER_TOKEN = 16
"""Of a prompt that waits: its tokens in a list of Python integers, and once more as four bytes each, to sort by."""
FOLLOWER_BYTES = 300
"""Of a row that waits for the answer to another one with the same prompt."""
SHARE_TO_ORDER = 4
"""Windows full of prompts that are gathered before the first is run, so that there is something to put in order."""
MOST_GIVEN = 2
"""Batches of results from elsewhere that wait for the reading thread."""
GATHER_SECONDS = 2.0
"""How long that may take while the engine stands idle."""

_calls = itertools.count()


@dataclass(frozen=True, slots=True)
class Waiting:
    """What may wait to be put into the engine: ``rows`` prompts, of ``n_bytes`` bytes in memory.

    ``whole``: as many are gathered before the first is run, however long that takes.
    """

    rows: int
    n_bytes: int
    whole: bool = False


class Requests:
    """One call's requests. ``params``: vLLM's, for rows without own ones; ``work`` names what calls in turn share.

    ``backlog`` orders what waits, up to the limits of ``waiting``; ``lengths`` learns from what finishes; with
    ``once``, a prompt that occurs again is not run again, where ``identity`` knows it again; ``room`` is for the media
    of prompts. ``timeout``: seconds that a request may be inside the engine, its queue included.
    """

    def __init__(
        self,
        engine: RunningVllm,
        params: Any,
        window: AdmissionLimit,
        work: str,
        *,
        backlog: Backlog[Prompt],
        waiting: Waiting,
        lengths: Lengths,
        once: RequestDedup[Finished, Prompt] | None,
        dedup_key: DedupKey,
        room: MediaMemoryBudget,
        timeout: float | None = None,
    ) -> None:
        self._engine, self._params, self._window = engine, params, window
        self._name = f"c{next(_calls)}"
        self._changed = window.changed
        self._place = window.join(work)
        self._waiting, self._gather, self._room, self._timeout = waiting, 0, room, timeout
        if backlog.orders:
            self._gather = waiting.rows if waiting.whole else SHARE_TO_ORDER * window.requests
        # Under the condition:
        self._backlog, self._lengths, self._once, self._identity = backlog, lengths, once, dedup_key
        self._finished: list[Outcome] = []
        self._given: list[ResultBatch] = []
        self._fed = False
        self._stopped = False
        self._error: BaseException | None = None
        self._first_at: float | None = None
        self._unmade_bytes = 0
        # In the engine's loop only:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._inside = 0
        self._fresh: list[tuple[Prompt, Outcome]] = []
        self._aborting: asyncio.Task[None] | None = None
        engine.when_stopped(self._abandon)

    # ---- the thread that makes prompts ----

    def offer(self, prompts: Sequence[Prompt], failures: Sequence[RowFailure]) -> bool:
        """Take prompts in, waiting while too much waits already. False when the call has been stopped."""
        keys = [array("i", prompt.tokens).tobytes() for prompt in prompts]
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not (self._full() or self._piled_up()))
            if self._stopped:
                return False
            self._finished += failures
            for prompt, key in zip(prompts, keys, strict=True):
                if self._must_run(prompt, key):
                    self._backlog.push(key, prompt)
                    self._unmade_bytes += prompt.make_bytes or 0
            if self._first_at is None and len(self._backlog):
                self._first_at = time.monotonic()
            self._tell()
        return True

    def give(self, batch: ResultBatch) -> bool:
        """Results that need not be computed, to be read with the others. Waits and returns as :meth:`offer` does."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._given) < MOST_GIVEN)
            if not self._stopped:
                self._given.append(batch)
                self._tell()
            return not self._stopped

    def end_offering(self, error: BaseException | None = None) -> None:
        """No more prompts will come; ``error`` if that is because reading them failed."""
        with self._changed:
            self._fed = True
            self._error = self._error or error
            self._tell()

    def _must_run(self, prompt: Prompt, key: bytes) -> bool:
        settles = None if self._once is None else self._identity(prompt, key)
        if self._once is None or settles is None:
            return True
        # What follows another row is not run: it needs no tokens.
        must, finished = self._once.admit(prompt.row, settles, replace(prompt, tokens=[]))
        if finished is not None:
            self._finished.append(finished.for_row(prompt))
        return must

    def _full(self) -> bool:
        following = 0 if self._once is None else self._once.waiting
        n_bytes = BYTES_PER_TOKEN * self._backlog.n_bytes // TOKEN_BYTES + FOLLOWER_BYTES * following
        n_bytes += self._unmade_bytes
        return len(self._backlog) + following >= self._waiting.rows or n_bytes >= self._waiting.n_bytes

    def _piled_up(self) -> bool:
        # A reader that is busy elsewhere (flushing a file) must not stop the engine, nor let results pile up for ever.
        return len(self._finished) >= 8 * self._window.requests

    def _tell(self) -> None:
        """Something changed: whether this call has more to give, too."""
        self._place.ready = self._ready()
        self._changed.notify_all()

    def _ready(self) -> bool:
        """Whether this call has something to give now; if not, others need not wait for it."""
        ended = self._stopped or self._error is not None
        return bool(len(self._backlog)) and not ended and not self._piled_up() and self._patience() is None

    # ---- the feeding thread ----

    def feed(self) -> None:
        """Put what waits into the engine, as there is room, until no more comes or the call is stopped."""
        while True:
            with self._changed:
                while not (self._stopped or self._error or (self._fed and not len(self._backlog)) or self._startable()):
                    self._changed.wait(self._patience())
                count = self._startable()
                if self._stopped or self._error or not count:
                    return
                some = self._pop(count)
                self._place.inside += len(some)
                self._place.tokens += sum(len(prompt.tokens) for prompt in some)
                self._tell()
            self._in_loop(self._start, some)

    def _pop(self, most: int) -> list[Prompt]:
        """The next prompts, until the window's tokens are reached; one in any case."""
        some: list[Prompt] = []
        left = self._window.tokens_left()
        while len(some) < most and (left > 0 or not some):
            some += self._backlog.pop(1)
            left -= len(some[-1].tokens)
        return some

    def _startable(self) -> int:
        """How many requests to start now."""
        self._place.ready = self._ready()
        if not self._place.ready:
            return 0
        room = min(self._window.room(self._place), len(self._backlog))
        # Not one by one as requests finish: an eighth of the window at a time keeps the engine just as busy.
        least = min(max(1, self._window.requests // 8), len(self._backlog))
        return room if room >= least else 0

    def _patience(self) -> float | None:
        """Seconds to go on gathering prompts before the first is run; ``None``: no longer."""
        if self._fed or self._full() or len(self._backlog) >= self._gather:
            self._gather = 0
        if not self._gather or self._first_at is None:
            return None
        if self._waiting.whole:
            return GATHER_SECONDS  # then look again
        left = self._first_at + GATHER_SECONDS - time.monotonic()
        if left <= 0:
            self._gather = 0
            return None
        return left

    # ---- the thread that reads answers ----

    def results(self) -> Iterator[list[Outcome] | ResultBatch]:
        """What has finished, all there is at a time, and what was given, until every request has finished or the call
        is stopped.

        Raises what the other threads or the engine raised.
        """
        while True:
            with self._changed:
                self._changed.wait_for(self._anything)
                # What has finished is done, even if the call was stopped or the engine died right after it.
                done = self._finished or self._given
                if self._stopped and not done:
                    return
                if self._error is not None and not done:
                    raise self._error
                some, self._finished = self._finished, []
                given, self._given = self._given, []
                self._tell()
            if not some and not given:
                return
            yield from given
            if some:
                yield some

    def _anything(self) -> bool:
        return bool(self._finished or self._given or self._stopped or self._error or self._over())

    def _over(self) -> bool:
        return self._fed and not len(self._backlog) and not self._place.inside

    # ---- any thread ----

    def stop(self) -> None:
        """Abort what is inside the engine and end both threads' waits. Does not wait; safe to call again."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._tell()
        self._in_loop(self._cancel)

    def wait_until_aborted(self) -> None:
        """After :meth:`stop`: until nothing of this call is inside the engine."""
        self._engine.when_stopped(self._abandon, forget=True)
        if not self._engine.dead:
            with contextlib.suppress(TimeoutError, FutureCancelled):
                self._engine.call(self._drained()).result(STOP_SECONDS)
        self._window.leave(self._place)

    def _abandon(self) -> None:
        """The engine is being closed under this call."""
        with self._changed:
            closed = EngineDead("the vLLM engine was closed while rows were in it", blame=Blame.OTHERS)
            self._error = self._error or closed
            self._tell()

    def _in_loop(self, callback: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: its end has been told to this call
            self._engine.loop.call_soon_threadsafe(callback, *args)

    # ---- the engine's loop ----

    def _start(self, prompts: Sequence[Prompt]) -> None:
        if self._stopped:
            return
        for prompt in prompts:
            name = f"{self._name}-{prompt.row}"
            self._tasks[name] = self._engine.loop.create_task(self._run(name, prompt))

    async def _run(self, name: str, prompt: Prompt) -> None:
        from vllm.exceptions import GracefulHTTPError, VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        entered, limit = 0, asyncio.timeout(self._timeout)
        try:
            prepared: Any = {"type": "token", "prompt_token_ids": prompt.tokens}
            if prompt.make is not None:
                try:
                    prepared = await self._room.make(name, prompt.make)
                finally:
                    self._made(prompt)
            params = self._params if prompt.params is None else prompt.params.sampling
            # Into an engine that is known to be dead nothing goes: this row has not killed it.
            entered = int(not self._engine.dead)
            self._count(entered)
            async with limit:
                queue = await self._engine.llm.add_request(name, prepared, params, lora_request=prompt.adapter)
                # Inside, it is vLLM's: what it was made of would be kept here until it has finished.
                del prepared
                prompt = replace(prompt, make=None)
                output = await queue.get()
        except RowError as error:
            self._finish(prompt, RowFailure(prompt.row, error.code, error.message))
        # OverflowError: a number that does not fit into a message to vLLM's process.
        except (VLLMClientError, ValueError, TypeError, OverflowError) as error:
            await self._forget(name)
            self._finish(prompt, RowFailure(prompt.row, RowErrorCode.ENGINE_REFUSED, first_lines(error, MESSAGE_LIMIT)))
        except EngineDeadError:
            self._fail(self._death)
        except GracefulHTTPError as error:
            refusal = TransientError(f"vLLM takes no more requests: {first_lines(error)}")
            self._fail(lambda: refusal)
        except Exception as error:
            await self._forget(name)
            if limit.expired():
                message = request_timed_out(self._timeout)
                self._finish(prompt, RowFailure(prompt.row, RowErrorCode.REQUEST_TIMEOUT, message))
                return
            # Not a row's fault, and not one that is known: it ends the call, as itself.
            unknown = error
            self._fail(self._death if self._engine.dead else lambda: unknown)
        else:
            self._finish(prompt, Finished(prompt, output))
        finally:
            self._count(-entered)
            self._room.leave(name)
            self._tasks.pop(name, None)

    def _made(self, prompt: Prompt) -> None:
        with self._changed:
            self._unmade_bytes -= prompt.make_bytes or 0
            self._tell()

    async def _forget(self, name: str) -> None:
        """vLLM may have noted a request before it failed; it would wait for its answer for ever."""
        with contextlib.suppress(Exception):
            await self._engine.llm.abort(name)

    def _count(self, entered: int) -> None:
        self._inside += entered
        self._engine.inside += entered

    def _death(self) -> EngineDead:
        return self._engine.death(own=self._inside > 0)

    def _finish(self, prompt: Prompt, outcome: Outcome) -> None:
        self._fresh.append((prompt, outcome))
        if len(self._fresh) == 1:
            # After the other tasks that this step of the engine has woken.
            self._engine.loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        fresh, self._fresh = self._fresh, []
        with self._changed:
            for prompt, outcome in fresh:
                self._place.inside -= 1
                self._place.tokens -= len(prompt.tokens)
                self._finished.append(outcome)
                if isinstance(outcome, Finished):
                    self._lengths.observe(len(prompt.tokens), outcome.completion_tokens)
                if self._once is not None:
                    self._finished += self._copies(self._once, outcome)
            self._tell()

    def _copies(self, once: RequestDedup[Finished, Prompt], outcome: Outcome) -> list[Outcome]:
        """What the rows get that have the same prompt as one that has just been run."""
        if isinstance(outcome, RowFailure):
            return [replace(outcome, row=other.row) for other in once.finish(outcome.row, None, 0)]
        lasting = None if outcome.given_up else outcome
        return [outcome.for_row(other) for other in once.finish(outcome.prompt.row, lasting, outcome.n_bytes)]

    def _fail(self, error: Callable[[], BaseException]) -> None:
        if self._error is None and not self._stopped:
            found = error()
            with self._changed:
                self._error = self._error or found
                self._tell()

    def _cancel(self) -> None:
        names = list(self._tasks)
        for task in self._tasks.values():
            task.cancel()
        if names and not self._engine.dead:
            self._aborting = self._engine.loop.create_task(self._engine.llm.abort(names))

    async def _drained(self) -> None:
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._aborting is not None:
            await self._aborting
