"""The requests of one ``infer`` call inside vLLM: a bounded window of them, fed from one thread, read from another.

One task per request in the engine's loop, woken once, when the request has finished. What finishes in one step of the
engine crosses to the reading thread together.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError as FutureCancelled
from dataclasses import dataclass
from typing import Any

from pipeline.engines.base import RowFailure
from pipeline.engines.vllm_process import STOP_SECONDS, RunningVllm, first_lines
from pipeline.engines.vllm_prompts import Prompt
from pipeline.row_errors import MESSAGE_LIMIT, RowErrorCode
from storage.errors import EngineDead, RowError, TransientError

_calls = itertools.count()


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that vLLM has finished. ``output``: its ``RequestOutput`` or ``PoolingRequestOutput``."""

    prompt: Prompt
    output: Any


Outcome = Finished | RowFailure


class Requests:
    """One call's requests. ``window`` bounds those inside the engine; ``params``: vLLM's, for rows without own ones."""

    def __init__(self, engine: RunningVllm, params: Any, window: int) -> None:
        self._engine, self._params, self._window = engine, params, window
        self._name = f"c{next(_calls)}"
        self._changed = threading.Condition()
        # Under the condition:
        self._finished: list[Outcome] = []
        self._inside = 0
        self._fed = False
        self._stopped = False
        self._error: BaseException | None = None
        # In the engine's loop only:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._fresh: list[Outcome] = []
        self._aborting: asyncio.Task[None] | None = None
        engine.when_stopped(self._abandon)

    # ---- the feeding thread ----

    def feed(self, prompts: Sequence[Prompt], failures: Sequence[RowFailure]) -> bool:
        """Hand over prompts, waiting for room in the window. False when the call has been stopped."""
        if failures:
            with self._changed:
                self._finished += failures
                self._changed.notify_all()
        # Not one by one as requests finish: an eighth of the window at a time keeps the engine just as busy.
        least = max(1, self._window // 8)
        at = 0
        while at < len(prompts):
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._room() >= min(least, len(prompts) - at))  # noqa: B023
                if self._stopped:
                    return False
                some = prompts[at : at + self._room()]
                self._inside += len(some)
            at += len(some)
            self._in_loop(self._start, some)
        return not self._stopped

    def _room(self) -> int:
        # A reader that is busy elsewhere (flushing a file) must not stop the engine, nor let results pile up for ever.
        return self._window - self._inside if len(self._finished) < 8 * self._window else 0

    def end_feeding(self, error: BaseException | None = None) -> None:
        """No more prompts will come; ``error`` if that is because reading them failed."""
        with self._changed:
            self._fed = True
            self._error = self._error or error
            self._changed.notify_all()

    # ---- the reading thread ----

    def results(self) -> Iterator[list[Outcome]]:
        """What has finished, all there is at a time, until every request has or the call is stopped.

        Raises what the feeding thread or the engine raised.
        """
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._finished or self._stopped or self._error or (self._fed and not self._inside)
                )
                if self._stopped:
                    return
                # What has finished is done, even if the engine died right after it.
                if self._error is not None and not self._finished:
                    raise self._error
                some, self._finished = self._finished, []
                self._changed.notify_all()
            if not some:
                return
            yield some

    # ---- any thread ----

    def stop(self) -> None:
        """Abort what is inside the engine and end both threads' waits. Does not wait; safe to call again."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._changed.notify_all()
        self._in_loop(self._cancel)

    def wait_until_aborted(self) -> None:
        """After :meth:`stop`: until nothing of this call is inside the engine."""
        self._engine.when_stopped(self._abandon, forget=True)
        if not self._engine.dead:
            with contextlib.suppress(TimeoutError, FutureCancelled):
                self._engine.call(self._drained()).result(STOP_SECONDS)

    def _abandon(self) -> None:
        """The engine is being closed under this call."""
        with self._changed:
            self._error = self._error or EngineDead("the vLLM engine was closed while rows were in it")
            self._changed.notify_all()

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

        try:
            prepared: Any = {"type": "token", "prompt_token_ids": prompt.tokens}
            if prompt.make is not None:
                prepared = await self._engine.loop.run_in_executor(None, prompt.make)
            params = self._params if prompt.params is None else prompt.params.sampling
            queue = await self._engine.llm.add_request(name, prepared, params, lora_request=prompt.adapter)
            output = await queue.get()
        except RowError as error:
            self._finish(RowFailure(prompt.row, error.code, error.message))
        except (VLLMClientError, ValueError, TypeError) as error:
            self._finish(RowFailure(prompt.row, RowErrorCode.ENGINE_REFUSED, first_lines(error, MESSAGE_LIMIT)))
        except EngineDeadError:
            self._fail(self._engine.death)
        except GracefulHTTPError as error:
            refusal = TransientError(f"vLLM takes no more requests: {first_lines(error)}")
            self._fail(lambda: refusal)
        except Exception as error:
            # Not a row's fault, and not one that is known: it ends the call, as itself.
            unknown = error
            self._fail(self._engine.death if self._engine.dead else lambda: unknown)
        else:
            self._finish(Finished(prompt, output))
        finally:
            self._tasks.pop(name, None)

    def _finish(self, outcome: Outcome) -> None:
        self._fresh.append(outcome)
        if len(self._fresh) == 1:
            # After the other tasks that this step of the engine has woken.
            self._engine.loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        fresh, self._fresh = self._fresh, []
        with self._changed:
            self._finished += fresh
            self._inside -= len(fresh)
            self._changed.notify_all()

    def _fail(self, error: Callable[[], BaseException]) -> None:
        if self._error is None and not self._stopped:
            found = error()
            with self._changed:
                self._error = self._error or found
                self._changed.notify_all()

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
