"""What ``rowmill model benchmark`` makes of measured seconds: against a machine whose speed is known."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines.vllm.benchmark import (
    CONCURRENCIES,
    CONTEXT,
    MOST_SECONDS,
    Machine,
    Weights,
    measure,
    summary,
    weights_of,
)

SPEEDS = st.floats(10, 1e6)


@given(SPEEDS, SPEEDS, st.floats(0, 0.5), st.integers(1, 300), st.integers(40, 4096), st.integers(64, 2**20))
def test_prefill_and_decode_are_told_apart(
    prefill: float, decode: float, overhead: float, most: int, context: int, cache: int
) -> None:
    def ask(prompts: int, tokens: int, answer: int) -> float:
        assert tokens + answer <= context and (prompts <= most or tokens != CONTEXT)
        return prompts * tokens / prefill + prompts * (answer - 1) / decode + overhead

    rows = list(measure(ask, context=context, most_requests=most, cache_tokens=cache, weights=None, machine=None))
    for row in rows:
        if row["what"] == "decode":
            assert row["tokens_per_second"] == pytest.approx(decode, rel=0.01, abs=0.1)
        else:
            assert row["tokens_per_second"] <= prefill * 1.01 + 0.1
    asked = [row["requests"] for row in rows if row["what"] == "decode"]
    assert asked == list(CONCURRENCIES[: len(asked)])
    assert all(row["limit"] is None and row["share"] is None for row in rows)
    if asked and asked[-1] < CONCURRENCIES[-1] and min(context, cache // 256) > 100 and most >= 256:
        assert CONCURRENCIES[len(asked)] * 8 * 4 / decode > MOST_SECONDS / 2 or prefill < 2000
    assert (", decode " in summary(rows)) == (0 < len(asked) < len(rows))


def test_limits() -> None:
    weights, machine = Weights(parameters=100, n_bytes=400, kv_bytes=8), Machine(bandwidth=4000, flops=10**5)
    assert machine.prefill(weights) == 500
    # One request reads the weights and its own tokens; many share the reading, until multiplying takes longer.
    assert machine.decode(weights, 1, 0) == 10
    assert machine.decode(weights, 1, 50) == 5
    assert machine.decode(weights, 10, 0) == 100
    assert machine.decode(weights, 1000, 0) == 500


def config(tied: bool = False, quantized: bool = False, **more: Any) -> Any:
    model = Namespace(
        dtype=Namespace(itemsize=2),
        hf_text_config=Namespace(tie_word_embeddings=tied, **more),
        get_num_layers=lambda _: 3,
        get_total_num_kv_heads=lambda: 2,
        get_head_size=lambda: 8,
    )
    return Namespace(model_config=model, parallel_config=None, quant_config=object() if quantized else None)


def test_weights_are_counted_from_the_headers(tmp_path: Path) -> None:
    assert weights_of(tmp_path, config()) is None
    shapes = {"model.embed_tokens.weight": [10, 4], "lm_head.weight": [10, 4], "a": [3, 5]}
    header = json.dumps({"__metadata__": {}} | {name: {"shape": shape} for name, shape in shapes.items()}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert weights_of(tmp_path, config()) == Weights(55, 110, 2 * 3 * 16 * 2)
    assert weights_of(tmp_path, config(tied=True)) == Weights(95, 190, 192)
    assert weights_of(tmp_path, config(quantized=True)) is None
    assert weights_of(tmp_path, config(num_experts=8)) is None
