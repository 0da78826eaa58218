"""The requests of one ``infer`` call: prompts put into vLLM by one thread, and what has finished read by another.

Each request is one task in the engine's loop, which is woken once, when the request has finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError as FutureCancelled
from dataclasses import replace
from typing import Any

from pipeline.engines.base import ResultBatch, RowFailure
from pipeline.engines.vllm.process.output import STOP_SECONDS, first_lines
from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.engines.vllm.prompts.prompts import Prompt
from pipeline.engines.vllm.requests.exchange import Exchange
from pipeline.engines.vllm.requests.media_budget import MediaMemoryBudget
from pipeline.engines.vllm.requests.outcome import Finished, Outcome
from pipeline.spec.error_codes import MESSAGE_LIMIT, RowErrorCode, request_timed_out
from storage.errors import Blame, EngineDead, RowError, TransientError

_calls = itertools.count()


class Requests:
    """Runs prompts and hands their outcomes to ``exchange``, those of one step of the engine together.

    ``params``: vLLM's, for rows without their own; ``media`` bounds the memory of prompts' media. ``timeout``: seconds
    that a request may be inside the engine, its queue included.
    """

    def __init__(
        self, engine: RunningVllm, exchange: Exchange, params: Any, media: MediaMemoryBudget, timeout: float | None
    ) -> None:
        self._engine, self.exchange, self._params = engine, exchange, params
        self._media, self._timeout = media, timeout
        self._name = f"c{next(_calls)}"
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._inside = 0
        self._completed: list[tuple[Prompt, Outcome]] = []
        self._aborting: asyncio.Task[None] | None = None

        engine.when_stopped(self._abandon)

    # ---- the feeding thread ----

    def feed(self) -> None:
        """Put what waits into the engine, as there is room, until no more comes or the call is stopped."""
        while prompts := self.exchange.next_prompts():
            self._in_loop(self._start, prompts)

    # ---- the thread that reads results ----

    def results(self) -> Iterator[list[Outcome] | ResultBatch]:
        """What has finished, all there is at a time, and what was given, until every request has finished or the call
        is stopped.

        Raises what the other threads or the engine raised.
        """
        while True:
            given, finished = self.exchange.take()
            if not given and not finished:
                return
            yield from given
            if finished:
                yield finished

    # ---- any thread ----

    def stop(self) -> None:
        """Abort what is inside the engine and end both threads' waits. Does not wait; safe to call again."""
        if self.exchange.stop():
            self._in_loop(self._cancel)

    def wait_until_aborted(self) -> None:
        """After :meth:`stop`: until nothing of this call is inside the engine, for at most ``STOP_SECONDS``."""
        self._engine.when_stopped(self._abandon, forget=True)
        if not self._engine.dead:
            with contextlib.suppress(TimeoutError, FutureCancelled):
                self._engine.call(self._drained()).result(STOP_SECONDS)
        self.exchange.leave()

    def _abandon(self) -> None:
        """The engine is being closed under this call."""
        self.exchange.fail(lambda: EngineDead("the vLLM engine was closed while rows were in it", blame=Blame.OTHERS))

    def _in_loop(self, callback: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: its end has been told to this call
            self._engine.loop.call_soon_threadsafe(callback, *args)

    # ---- the engine's loop ----

    def _start(self, prompts: Sequence[Prompt]) -> None:
        if self.exchange.stopped:
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
                    prepared = await self._media.make(name, prompt.make)
                finally:
                    self.exchange.media_made(prompt)
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
            self.exchange.fail(self._death)
        except GracefulHTTPError as error:
            refusal = TransientError(f"vLLM takes no more requests: {first_lines(error)}")
            self.exchange.fail(lambda: refusal)
        except Exception as error:
            await self._forget(name)
            if limit.expired():
                message = request_timed_out(self._timeout)
                self._finish(prompt, RowFailure(prompt.row, RowErrorCode.REQUEST_TIMEOUT, message))
                return
            # Not a row's fault, and not one that is known: it ends the call, as itself.
            unknown = error
            self.exchange.fail(self._death if self._engine.dead else lambda: unknown)
        else:
            self._finish(prompt, Finished(prompt, output))
        finally:
            self._count(-entered)
            self._media.leave(name)
            self._tasks.pop(name, None)

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
        self._completed.append((prompt, outcome))
        if len(self._completed) == 1:
            # After the other tasks that this step of the engine has woken.
            self._engine.loop.call_soon(self._complete)

    def _complete(self) -> None:
        outcomes, self._completed = self._completed, []
        self.exchange.complete(outcomes)

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
