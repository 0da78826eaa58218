"""What attempts measure: sums that add up, and what is made of them."""

from __future__ import annotations

import pytest

from pipeline.process.metrics import Measures, derived, of_job, summed


def test_an_attempt_adds_up_what_it_is_told_and_times_its_parts() -> None:
    measures = Measures()
    assert measures.so_far() == {}
    measures.begin(load_seconds=2.0)
    assert list(measures.reading([1, 2])) == [1, 2]
    assert list(measures.waiting(iter("ab"))) == ["a", "b"]
    measures.add({"prompt_tokens": 3, "render_seconds": 0.5})
    measures.add({"prompt_tokens": 4})
    measures.flushed(rows=7, seconds=1.5)
    total = measures.total()
    assert total["prompt_tokens"] == 7
    assert total["render_seconds"] == 0.5
    assert total["rows"] == 7
    assert total["load_seconds"] == 2.0
    assert total["write_seconds"] == 1.5
    assert "copied_rows" not in total


def test_errors_of_what_is_timed_come_through() -> None:
    def broken() -> object:
        yield 1
        raise KeyError

    with pytest.raises(KeyError):
        list(Measures().reading(broken()))  # type: ignore[arg-type, var-annotated]


def test_sums_over_attempts_and_what_they_say() -> None:
    one = {"prompt_tokens": 60, "cached_tokens": 30, "completion_tokens": 40, "attempt_seconds": 4.0, "rows": 2}
    two = {"prompt_tokens": 40, "attempt_seconds": 6.0, "read_seconds": 1.0, "engine_steps": 4, "kv_cache_use": 1.0}
    total = summed([one, two])
    assert total["prompt_tokens"] == 100
    found = derived(total)
    assert found["prefix_hit_rate"] == 0.3
    assert found["tokens_per_second"] == 14.0
    assert found["kv_cache_use"] == 0.25
    assert found["read_share"] == 0.1
    assert derived({}) == {}
    assert summed([]) == {}


def test_attempts_side_by_side_share_the_clock() -> None:
    one = {"completion_tokens": 100, "attempt_seconds": 10.0, "load_seconds": 5.0}
    two = {"completion_tokens": 100, "attempt_seconds": 8.0, "load_seconds": 5.0}
    later = {"completion_tokens": 40, "attempt_seconds": 2.0, "read_seconds": 1.0}
    total = of_job([(one, 115.0), (later, 202.0), (two, 113.0)])
    assert total["completion_tokens"] == 240 and total["attempt_seconds"] == 20.0
    assert (total["busy_seconds"], total["loading_seconds"]) == (12.0, 5.0)
    found = derived(total)
    assert found["tokens_per_second"] == 20.0
    assert found["read_share"] == 0.05  # of the attempts' own time
    assert of_job([]) == {}
