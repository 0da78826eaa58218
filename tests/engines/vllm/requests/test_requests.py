"""What happens to the requests of a call around vLLM: with a scripted stand-in for it, whose every step a test decides.

That vLLM itself behaves as the stand-in does is for ``test_engine.py``.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.engines.base import RowFailure
from pipeline.engines.vllm.process.scheduler_stats import Gauges, Measures
from pipeline.engines.vllm.prompts.prompts import Prompt
from pipeline.engines.vllm.prompts.sampling_params import Params
from pipeline.engines.vllm.requests.admission import AdmissionLimit
from pipeline.engines.vllm.requests.dedup import RequestDedup, dedup_keys
from pipeline.engines.vllm.requests.exchange import Exchange
from pipeline.engines.vllm.requests.media_budget import MediaMemoryBudget
from pipeline.engines.vllm.requests.outcome import LOGPROB_BYTES, Finished
from pipeline.engines.vllm.requests.requests import Requests
from pipeline.engines.vllm.requests.waiting import WaitingLimits, WaitingPrompts
from pipeline.prefix.order import Backlog, Lengths
from storage.errors import Blame, EngineDead
from tests.faults.driver import wait_until

pytestmark = pytest.mark.vllm


class Scripted:
    """Takes requests like ``RunningVllm`` and its ``AsyncLLM``; they finish, or die, when the test says so."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.llm = self
        self.dead = False
        self.inside = 0
        self.queues: dict[str, asyncio.Queue[Any]] = {}
        self.aborted: list[str] = []
        self.refuse: Exception | None = None
        self._with_rows = False
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    async def add_request(self, name: str, prepared: Any, params: Any, lora_request: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        if self.dead:
            raise EngineDeadError
        queue = self.queues[name] = asyncio.Queue()
        if self.refuse is not None:
            raise self.refuse
        return SimpleNamespace(get=lambda: self._answer(queue))

    async def _answer(self, queue: asyncio.Queue[Any]) -> Any:
        answer = await queue.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def abort(self, names: str | list[str]) -> None:
        self.aborted += [names] if isinstance(names, str) else names

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def when_stopped(self, callback: Callable[[], None], *, forget: bool = False) -> None:
        """It never is."""

    def death(self, *, own: bool = False) -> EngineDead:
        from pipeline.engines.vllm.process.process import RunningVllm

        stuck = SimpleNamespace(
            _stuck=True, _stuck_message=lambda: "scripted", inside=self.inside, _died_with_rows=self._with_rows
        )
        found = RunningVllm.death(stuck, own=own)  # type: ignore[arg-type]
        self._with_rows = stuck._died_with_rows
        return found

    # The test's side.

    def put(self, answer: Any, *names: str) -> None:
        for name in names or tuple(self.queues):
            self.loop.call_soon_threadsafe(self.queues.pop(name).put_nowait, answer)

    def die(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        self.dead = True
        self.put(EngineDeadError())

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture
def engine() -> Iterator[Scripted]:
    import vllm.v1.engine.exceptions  # noqa: F401 - not within a wait of the test: on a busy machine it takes a minute

    made = Scripted()
    yield made
    made.close()


class Call:
    """One call's requests, fed by a thread until the block ends."""

    def __init__(
        self,
        engine: Scripted,
        window: AdmissionLimit,
        *,
        rows: int = 100,
        dedup: bool = False,
        is_deterministic: bool = True,
        timeout: float | None = None,
    ) -> None:
        waiting = WaitingPrompts(
            Backlog(),
            WaitingLimits(rows, 2**20),
            4 * window.requests,
            lengths=Lengths(16),
            dedup=RequestDedup() if dedup else None,
            dedup_key=dedup_keys(pools=False, is_deterministic=is_deterministic),
        )
        media = MediaMemoryBudget(2**20, lambda made: 1)
        self.requests = Requests(engine, Exchange(window, "work", waiting), None, media, timeout)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self.requests.feed)

    def __enter__(self) -> Requests:
        self._thread.start()
        return self.requests

    def __exit__(self, *_: object) -> None:
        self.requests.stop()
        self.requests.wait_until_aborted()
        self._thread.join()


def prompts(n: int, tokens: int = 1, first: int = 0, **fields: Any) -> list[Prompt]:
    return [Prompt(row, [row] * tokens, **fields) for row in range(first, first + n)]


def answer(text: str = "x", **fields: Any) -> Any:
    """As vLLM's ``RequestOutput``."""
    completion = SimpleNamespace(text=text, token_ids=[1], finish_reason="stop", logprobs=None, **fields)
    return SimpleNamespace(outputs=[completion], prompt_logprobs=None)


def test_only_rows_that_were_inside_are_to_blame_for_a_death(engine: Scripted) -> None:
    window = AdmissionLimit(requests=8, tokens=1000)
    with Call(engine, window) as guilty, Call(engine, window) as innocent:
        guilty.exchange.offer(prompts(2), [])
        wait_until(lambda: len(engine.queues) == 2)
        engine.die()
        innocent.exchange.offer(prompts(1), [])
        for requests, blame in ((innocent, Blame.OTHERS), (guilty, Blame.OWN)):
            with pytest.raises(EngineDead) as caught:
                list(requests.results())
            assert caught.value.blame is blame


def test_an_engine_that_dies_empty_is_nobodys_fault_and_one_that_is_closed_is_not_theirs(engine: Scripted) -> None:
    window = AdmissionLimit(requests=8, tokens=1000)
    with Call(engine, window) as first, Call(engine, window) as second:
        first.exchange.offer(prompts(2), [])
        wait_until(lambda: len(engine.queues) == 2)
        first._abandon()
        engine.put(answer())
        wait_until(lambda: not engine.inside)
        engine.die()
        second.exchange.offer(prompts(1), [])
        with pytest.raises(EngineDead) as caught:
            list(second.results())
        assert caught.value.blame is Blame.NOBODY
        with pytest.raises(EngineDead, match="closed") as caught:
            list(first.results())
        assert caught.value.blame is Blame.OTHERS


def test_a_request_that_takes_too_long_is_aborted_and_the_others_go_on(engine: Scripted) -> None:
    with Call(engine, AdmissionLimit(requests=8, tokens=1000), dedup=True, timeout=0.2) as requests:
        same = [Prompt(row, [7], params=None) for row in (0, 1)]  # the second follows the first
        requests.exchange.offer(same, [])
        requests.exchange.end_offering()
        outcomes = [outcome for some in requests.results() for outcome in some]
        assert [type(outcome) for outcome in outcomes] == [RowFailure, RowFailure]
        assert {outcome.code for outcome in outcomes} == {"request_timeout"}
        assert "0.2 s" in outcomes[0].message
        assert len(engine.aborted) == 1
        assert engine.inside == 0
    with Call(engine, AdmissionLimit(requests=8, tokens=1000), timeout=3600.0) as requests:
        engine.queues.clear()
        requests.exchange.offer(prompts(2), [])
        requests.exchange.end_offering()
        wait_until(lambda: len(engine.queues) == 2)
        engine.put(answer())
        assert all(isinstance(outcome, Finished) for some in requests.results() for outcome in some)
    assert len(engine.aborted) == 1


def test_the_windows_tokens_are_kept_to(engine: Scripted) -> None:
    with Call(engine, AdmissionLimit(requests=64, tokens=100)) as requests:
        requests.exchange.offer(prompts(64, tokens=30), [])
        wait_until(lambda: len(engine.queues) == 4)
        assert requests.exchange._ticket.tokens == 120  # reached, with the last of them
        requests.exchange.offer(prompts(1, tokens=500, first=64), [])
        requests.exchange.end_offering()
        seen = 0
        for some in _answered(engine, requests):
            assert requests.exchange._ticket.tokens < 100 + 500  # the window, and the prompt with which it was reached
            seen += len(some)
        assert seen == 65


def _answered(engine: Scripted, requests: Requests) -> Iterator[list[Any]]:
    results = requests.results()
    while True:
        wait_until(lambda: engine.queues or requests.exchange._has_something())
        engine.put(answer())
        some = next(results, None)
        if some is None:
            return
        yield some


def test_what_has_finished_when_a_call_is_cancelled_is_handed_over(engine: Scripted) -> None:
    with Call(engine, AdmissionLimit(requests=8, tokens=1000)) as requests:
        requests.exchange.offer(prompts(4), [])
        wait_until(lambda: len(engine.queues) == 4)
        done = list(engine.queues)[:3]
        engine.put(answer(), *done)
        wait_until(lambda: len(requests.exchange._finished) == 3)
        requests.stop()
        assert [len(some) for some in requests.results()] == [3]


def test_a_number_that_fits_into_no_message_is_the_rows_error_and_leaves_nothing_behind(engine: Scripted) -> None:
    engine.refuse = OverflowError("Python int too large to convert to C unsigned long")
    with Call(engine, AdmissionLimit(requests=8, tokens=1000)) as requests:
        requests.exchange.offer(prompts(1), [])
        requests.exchange.end_offering()
        [[failure]] = requests.results()
        assert isinstance(failure, RowFailure) and failure.code == "engine_refused"
        assert engine.aborted == list(engine.queues)


def test_rows_that_follow_another_count_and_keep_no_tokens(engine: Scripted) -> None:
    with Call(engine, AdmissionLimit(requests=8, tokens=1000), rows=4, dedup=True) as requests:
        same = [Prompt(row, [7] * 50) for row in range(4)]
        requests.exchange.offer(same, [])
        wait_until(lambda: len(engine.queues) == 1)
        waiting = requests.exchange._waiting
        assert waiting._dedup is not None
        [followers] = waiting._dedup._followers.values()
        assert [(prompt.row, prompt.tokens) for prompt in followers] == [(1, []), (2, []), (3, [])]
        assert not waiting.full
        requests.exchange.offer([Prompt(4, [7] * 50)], [])
        assert waiting.full
        requests.exchange.end_offering()
        engine.put(answer())
        assert sorted(done.prompt.row for some in requests.results() for done in some) == [0, 1, 2, 3, 4]
        assert not waiting.full


def test_media_are_let_go_when_vllm_has_them(engine: Scripted) -> None:
    class Tensor:
        """Something that can be watched."""

    alive: list[weakref.ref[Tensor]] = []

    def made_of(raw: Tensor) -> Callable[[], Tensor]:
        def make() -> Tensor:
            made = Tensor()
            alive.extend((weakref.ref(raw), weakref.ref(made)))
            return made

        return make

    with Call(engine, AdmissionLimit(requests=8, tokens=1000)) as requests:
        requests.exchange.offer([Prompt(0, [], make=made_of(Tensor()))], [])
        requests.exchange.end_offering()
        wait_until(lambda: engine.queues)
        engine.call(asyncio.sleep(0)).result()
        wait_until(lambda: gc.collect() >= 0 and [ref() for ref in alive] == [None, None])
        engine.put(answer())
        [[finished]] = requests.results()
        assert isinstance(finished, Finished) and finished.prompt.make is None


def test_a_preemption_is_told_to_one_of_two_calls() -> None:
    gauges = Gauges()
    one, two = Measures(gauges), Measures(gauges)
    cache = SimpleNamespace(preempted_requests=3)
    counts = {"num_running_reqs": 4, "num_waiting_reqs": 0, "num_skipped_waiting_reqs": 0, "kv_cache_usage": 0.5}
    gauges.step(SimpleNamespace(prefix_cache_stats=cache, **counts))
    found = [one.rest(), two.rest(), one.rest()]
    assert sum(rest["preemptions"] for rest in found) == 3
    assert [rest["running_requests"] for rest in found] == [4, 4, 0], "its mean state, to each of them"


def test_probabilities_are_counted_in_the_memory_of_answers() -> None:
    bare = Finished(Prompt(0, [1]), answer())
    output = answer()
    output.outputs[0].logprobs = [{1: object(), 2: object()}, {3: object()}]
    output.prompt_logprobs = [None, {4: object()}]
    assert Finished(Prompt(0, [1]), output).n_bytes - bare.n_bytes == 4 * LOGPROB_BYTES


def test_only_rows_whose_answers_are_settled_are_run_once(engine: Scripted) -> None:
    drawn, greedy = (
        Params(SimpleNamespace(temperature=temperature, seed=None), key=str(temperature)) for temperature in (1.0, 0.0)
    )
    rows = [None, None, drawn, drawn, greedy, greedy]
    with Call(engine, AdmissionLimit(requests=8, tokens=1000), dedup=True, is_deterministic=False) as requests:
        requests.exchange.offer([Prompt(row, [1], params) for row, params in enumerate(rows)], [])
        wait_until(lambda: len(engine.queues) == 5)
        engine.put(answer())
        requests.exchange.end_offering()
        found = [outcome.prompt.row for outcomes in requests.results() for outcome in outcomes]  # type: ignore[union-attr]
    assert sorted(found) == list(range(6))


def test_a_question_to_a_process_that_died_ends(engine: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.engines.vllm.process import process

    monkeypatch.setattr(process, "LOOK_SECONDS", 0.01)

    async def never() -> None:
        engine.dead = True
        await asyncio.Event().wait()

    async def late() -> int:
        await asyncio.sleep(0.05)
        return 7

    async def slow() -> None:
        raise TimeoutError("its own")

    ask = process.RunningVllm.ask
    assert ask(engine, late()) == 7  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match="its own"):
        ask(engine, slow())  # type: ignore[arg-type]
    with pytest.raises(EngineDead):
        ask(engine, never())  # type: ignore[arg-type]
