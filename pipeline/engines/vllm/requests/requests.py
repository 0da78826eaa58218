"""The requests of one ``infer`` call: prompts taken in by one thread, put into vLLM by a second, read by a third."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.engines.base import ResultBatch
from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.engines.vllm.prompts.prompts import Prompt
from pipeline.engines.vllm.requests.admission import AdmissionLimit
from pipeline.engines.vllm.requests.dedup import DedupKey, RequestDedup
from pipeline.engines.vllm.requests.exchange import Exchange
from pipeline.engines.vllm.requests.media_budget import MediaMemoryBudget
from pipeline.engines.vllm.requests.outcome import Finished, Outcome
from pipeline.engines.vllm.requests.request_tasks import RequestTasks
from pipeline.engines.vllm.requests.waiting import WaitingLimits, WaitingPrompts
from pipeline.prefix.order import Backlog, Lengths
from storage.errors import Blame, EngineDead

SHARE_TO_ORDER = 4
"""Windows full of prompts that are gathered before the first is run, so that there is something to put in order."""


class Requests:
    """One call's requests, from :meth:`Exchange.offer` to :meth:`results`. The parts have their own modules: what
    waits (``waiting``), what the threads hand to each other (``exchange``), what is inside vLLM (``request_tasks``).

    ``params``, ``room`` and ``timeout`` are those of :class:`RequestTasks`; ``work`` is that of :class:`Exchange`;
    the others are those of :class:`WaitingPrompts`.
    """

    def __init__(
        self,
        engine: RunningVllm,
        params: Any,
        window: AdmissionLimit,
        work: str,
        *,
        backlog: Backlog[Prompt],
        limits: WaitingLimits,
        lengths: Lengths,
        dedup: RequestDedup[Finished, Prompt] | None,
        dedup_key: DedupKey,
        room: MediaMemoryBudget,
        timeout: float | None = None,
    ) -> None:
        gather = SHARE_TO_ORDER * window.requests
        waiting = WaitingPrompts(backlog, limits, gather, lengths=lengths, dedup=dedup, dedup_key=dedup_key)
        self.exchange = Exchange(window, work, waiting)
        self._engine = engine
        self._tasks = RequestTasks(engine, self.exchange, params, room, timeout)
        engine.when_stopped(self._abandon)

    def feed(self) -> None:
        """Put what waits into the engine, as there is room, until no more comes or the call is stopped."""
        while prompts := self.exchange.next_prompts():
            self._tasks.submit(prompts)

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

    def stop(self) -> None:
        """Abort what is inside the engine and end both threads' waits. Does not wait; safe to call again."""
        if self.exchange.stop():
            self._tasks.cancel()

    def wait_until_aborted(self) -> None:
        """After :meth:`stop`: until nothing of this call is inside the engine."""
        self._engine.when_stopped(self._abandon, forget=True)
        self._tasks.wait_until_aborted()
        self.exchange.leave()

    def _abandon(self) -> None:
        """The engine is being closed under this call."""
        self.exchange.fail(lambda: EngineDead("the vLLM engine was closed while rows were in it", blame=Blame.OTHERS))
