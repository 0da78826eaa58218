"""What decides which request enters vLLM, and which never has to: pure pieces, without an engine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines.vllm.requests.admission import AdmissionLimit, Ticket
from pipeline.engines.vllm.requests.dedup import ENTRY_BYTES, RequestDedup, is_deterministic


def fill(window: AdmissionLimit, ticket: Ticket, requests: int, tokens: int = 0) -> None:
    ticket.inside += requests
    ticket.tokens += tokens


def test_calls_of_the_same_work_take_turns() -> None:
    window = AdmissionLimit(requests=8, tokens=100)
    first, second = window.join("job"), window.join("job")
    first.ready = second.ready = True
    assert (window.room(first), window.room(second)) == (8, 0)
    fill(window, first, 5)
    first.ready = False  # its last rows are inside: the next shard fills the batch up
    assert (window.room(first), window.room(second)) == (0, 3)
    window.leave(first)
    assert window.room(second) == 8


def test_other_work_gets_its_share() -> None:
    window = AdmissionLimit(requests=8, tokens=100)
    long, short = window.join("long"), window.join("short")
    long.ready = True
    fill(window, long, 8)
    short.ready = True
    assert (window.room(long), window.room(short)) == (0, 0)
    long.inside -= 2
    assert (window.room(long), window.room(short)) == (0, 2)
    fill(window, short, 2)
    long.inside -= 5
    assert window.room(long) == 5


def test_tokens_are_bounded_but_one_request_may_always_be_inside() -> None:
    window = AdmissionLimit(requests=8, tokens=100)
    ticket = window.join("job")
    ticket.ready = True
    fill(window, ticket, 1, tokens=1000)
    assert window.room(ticket) == 0
    fill(window, ticket, -1, tokens=-1000)
    assert window.room(ticket) == 8


def test_only_what_the_prompt_settles_is_run_once() -> None:
    assert (
        is_deterministic({"temperature": 0})
        and is_deterministic({"temperature": 0.0, "n": 1})
        and is_deterministic({"seed": 0})
    )
    assert not is_deterministic({"seed": -1}), "no seed, to vLLM"
    assert (
        not is_deterministic({}) and not is_deterministic({"temperature": 0.7}) and not is_deterministic({"seed": None})
    )


def test_followers_of_a_row_that_failed_are_told_and_nothing_is_remembered() -> None:
    once = RequestDedup[str, int]()
    assert once.admit(0, b"a", 0) == (True, None)
    assert once.admit(1, b"a", 1) == (False, None)
    assert once.waiting == 1
    assert once.finish(0, None, 0) == [1]
    assert once.waiting == 0
    assert once.admit(2, b"a", 2) == (True, None)


def test_a_row_that_was_not_admitted_leads_nobody() -> None:
    once = RequestDedup[str, int]()
    once.admit(0, b"a", 0)
    assert once.finish(7, "answer", 6) == []
    assert once.admit(1, b"a", 1) == (False, None)


def test_memory_is_bounded() -> None:
    once = RequestDedup[str, int](memory=2 * (ENTRY_BYTES + 10))
    for row, key in enumerate((b"a", b"b", b"c")):
        once.admit(row, key, row)
        once.finish(row, f"answer {row}", 10)
    assert once.admit(3, b"c", 3) == (False, "answer 2")
    assert once.admit(4, b"b", 4) == (False, "answer 1")
    assert once.admit(5, b"a", 5) == (True, None)


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.booleans()), max_size=40), st.integers(0, 900))
def test_every_row_gets_the_answer_to_its_prompt_once(rows: list[tuple[bytes, bool]], memory: int) -> None:
    once = RequestDedup[bytes, int](memory)
    answered: dict[int, bytes] = {}
    running: list[int] = []

    def finish() -> None:
        row = running.pop(0)
        for other in (row, *once.finish(row, rows[row][0], 1)):
            assert other not in answered
            answered[other] = rows[row][0]

    for row, (key, then_finish) in enumerate(rows):
        must, answer = once.admit(row, key, row)
        if must:
            running.append(row)
        elif answer is not None:
            answered[row] = answer
        if then_finish and running:
            finish()
    while running:
        finish()
    assert answered == dict(enumerate(key for key, _ in rows))
