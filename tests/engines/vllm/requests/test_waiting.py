"""What waits to be put into the engine: without vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.engines.base import RowFailure
from pipeline.engines.vllm.prompts.prompts import Prompt
from pipeline.engines.vllm.requests import waiting as waiting_module
from pipeline.engines.vllm.requests.admission import AdmissionLimit
from pipeline.engines.vllm.requests.dedup import RequestDedup, dedup_keys
from pipeline.engines.vllm.requests.exchange import Exchange
from pipeline.engines.vllm.requests.waiting import WaitingLimits, WaitingPrompts
from pipeline.prefix.order import Backlog, Lengths


def waiting_prompts(
    rows: int = 10, n_bytes: int = 2**20, *, gather: int = 0, whole: bool = False, dedup: bool = False
) -> WaitingPrompts:
    return WaitingPrompts(
        Backlog(4, lambda key, prompt: 0),
        WaitingLimits(rows, n_bytes, whole),
        gather,
        lengths=Lengths(16),
        dedup=RequestDedup() if dedup else None,
        dedup_key=dedup_keys(pools=False, is_deterministic=True),
    )


def add(waiting: WaitingPrompts, *prompts: Prompt) -> list[Any]:
    return list(waiting.add(prompts, [bytes(4 * prompt.tokens) for prompt in prompts]))


def test_prompts_are_gathered_until_there_are_enough_or_no_more_come() -> None:
    waiting = waiting_prompts(gather=3)
    assert waiting.patience() is None, "nothing waits"
    add(waiting, Prompt(0, [1]), Prompt(1, [2]))
    assert waiting.patience() is not None
    add(waiting, Prompt(2, [3]))
    assert waiting.patience() is None
    waiting.pop(3, 100)
    add(waiting, Prompt(3, [1]))
    assert waiting.patience() is None, "only before the first is run"

    ended = waiting_prompts(gather=3)
    add(ended, Prompt(0, [1]))
    ended.end()
    assert ended.patience() is None and not ended.over
    ended.pop(1, 100)
    assert ended.over


@pytest.mark.parametrize("whole", [False, True])
def test_an_idle_engine_waits_long_only_for_a_job_that_orders_all(
    monkeypatch: pytest.MonkeyPatch, *, whole: bool
) -> None:
    monkeypatch.setattr(waiting_module, "GATHER_SECONDS", 0.0)
    waiting = waiting_prompts(gather=3, whole=whole)
    add(waiting, Prompt(0, [1]))
    assert (waiting.patience() is None) is not whole
    add(waiting, *(Prompt(row, [row]) for row in range(1, 10)))
    assert waiting.patience() is None, "no more may wait"


def test_what_waits_is_limited_in_rows_and_bytes() -> None:
    by_rows, by_tokens, by_media = waiting_prompts(rows=2), waiting_prompts(n_bytes=64), waiting_prompts(n_bytes=64)
    add(by_rows, Prompt(0, [1]))
    assert not by_rows.full
    add(by_rows, Prompt(1, [1]))
    assert by_rows.full
    add(by_tokens, Prompt(0, [1, 2, 3]))
    assert not by_tokens.full
    add(by_tokens, Prompt(1, [1]))
    assert by_tokens.full
    image = Prompt(0, [], make=lambda: None, make_bytes=64)
    add(by_media, image)
    by_media.pop(1, 100)
    assert by_media.full, "what it is made of is in memory until it has been made"
    by_media.media_made(image)
    assert not by_media.full


def test_prompts_leave_until_their_tokens_are_reached_and_one_always() -> None:
    waiting = waiting_prompts()
    add(waiting, *(Prompt(row, [row] * 4) for row in range(5)))
    assert [prompt.row for prompt in waiting.pop(5, 5)] == [0, 1]
    assert [prompt.row for prompt in waiting.pop(2, 100)] == [2, 3]
    assert [prompt.row for prompt in waiting.pop(5, 0)] == [4]


def test_rows_that_follow_one_that_failed_fail_as_it_did() -> None:
    waiting = waiting_prompts(dedup=True)
    assert add(waiting, *(Prompt(row, [7]) for row in range(3))) == []
    [first] = waiting.pop(3, 100)
    failure = RowFailure(0, "engine_refused", "no")
    assert waiting.finish(first, failure) == [RowFailure(row, "engine_refused", "no") for row in (1, 2)]


def test_an_error_ends_a_call_after_what_had_finished() -> None:
    exchange = Exchange(AdmissionLimit(4, 100), "work", waiting_prompts())
    failures = [RowFailure(0, "invalid_value", "no")]
    exchange.offer([], failures)
    exchange.fail(lambda: ValueError("first"))
    exchange.fail(lambda: ValueError("second"))
    assert exchange.take() == ([], failures)
    with pytest.raises(ValueError, match="first"):
        exchange.take()
    assert exchange.next_prompts() == []


def test_a_stop_ends_every_wait_and_is_told_once() -> None:
    exchange = Exchange(AdmissionLimit(4, 100), "work", waiting_prompts())
    assert exchange.stop() and not exchange.stop()
    exchange.fail(lambda: pytest.fail("a stopped call asks for no error"))
    assert not exchange.offer([Prompt(0, [1])], [])
    assert exchange.next_prompts() == []
    assert exchange.take() == ([], [])
