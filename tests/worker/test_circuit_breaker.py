"""How long a worker that lacks something leaves a queue to the others."""

from __future__ import annotations

from pipeline.worker.circuit_breaker import LONGEST_HOLD_SECONDS, CircuitBreaker


def test_each_failure_in_a_row_holds_twice_as_long_and_a_success_ends_it() -> None:
    clock = [0.0]
    breaker = CircuitBreaker(lambda: clock[0])
    assert not breaker.is_open("onnx")
    for seconds in (5.0, 10.0, 20.0, 40.0, LONGEST_HOLD_SECONDS, LONGEST_HOLD_SECONDS):
        breaker.record("onnx", fit=False)
        assert breaker.is_open("onnx")
        assert not breaker.is_open("vllm")
        clock[0] += seconds - 0.1
        assert breaker.is_open("onnx")
        clock[0] += 0.2
        assert not breaker.is_open("onnx")
    breaker.record("onnx", fit=False)
    breaker.record("onnx", fit=True)
    assert not breaker.is_open("onnx")
