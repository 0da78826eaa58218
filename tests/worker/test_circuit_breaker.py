"""How long a worker that lacks something leaves a queue to the others."""

from __future__ import annotations

from pipeline.worker.circuit_breaker import LONGEST_HOLD_SECONDS, Unfit


def test_each_failure_in_a_row_holds_twice_as_long_and_a_success_ends_it() -> None:
    clock = [0.0]
    unfit = Unfit(lambda: clock[0])
    assert not unfit.held_back("onnx")
    for seconds in (5.0, 10.0, 20.0, 40.0, LONGEST_HOLD_SECONDS, LONGEST_HOLD_SECONDS):
        unfit.note("onnx", fit=False)
        assert unfit.held_back("onnx")
        assert not unfit.held_back("vllm")
        clock[0] += seconds - 0.1
        assert unfit.held_back("onnx")
        clock[0] += 0.2
        assert not unfit.held_back("onnx")
    unfit.note("onnx", fit=False)
    unfit.note("onnx", fit=True)
    assert not unfit.held_back("onnx")
