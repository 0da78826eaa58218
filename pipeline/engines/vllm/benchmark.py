"""How fast vLLM runs a model here: prefill and decode by themselves, beside what the machine could do at best.

Prompts are random tokens, no two alike, so that nothing is found in the prefix cache; answers have a fixed length. All
of it goes through the engine as rows of a job do.

*Decode*: ``n`` requests at a time with ``short`` and with ``long`` answers; what the long ones take more is decoding:
``n · (long - short) / (seconds of long - seconds of short)`` tokens/s.

*Limits*. A step of decoding reads every weight once, and the KV cache of every request: ``n`` tokens take at least
``(weights + n · context · KV bytes per token) / bandwidth`` seconds, and ``2 · weights · n / flops``, since a weight is
one multiplication and one addition for each token. Prefill is bound by the latter. The bandwidth is that of summing a
block as large as the weights again and again, so that a processor's cache that holds them counts; the rate is that of a
product of two square matrices in the model's type.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engines.base import Cancellation, ResultBatch, RowBatch
from pipeline.engines.model_config.sentence_layers import tensor_shapes
from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidModel

PREFILL_TOKENS = (128, 512, 2048)
CONCURRENCIES = (1, 4, 16, 64, 256)
CONTEXT = 32
"""Tokens of the prompts before which is decoded."""
SHORT = 4
"""Tokens of the short answers: the first comes from prefill, the others let all requests get under way."""
SECONDS = 2.0
"""What one measurement takes, about."""
REPEATS = 2
"""The fastest counts: whatever else the machine does only adds to it."""
MOST_SECONDS = 20.0
"""Concurrencies at which one answer of ``8 * SHORT`` tokens to all would take longer are left out."""
_BLOCK = (64 * 2**20, 2**30)
"""Least and most bytes of the block whose sum says the bandwidth."""
_MATRIX = 2048

Infer = Callable[[JobSpec, Iterable[RowBatch], Cancellation], Iterable[ResultBatch]]
Notify = Callable[[str], None]
Ask = Callable[[int, int, int], float]
"""Prompts, tokens of each, tokens of each answer → seconds until all are answered."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What decoding reads. ``parameters``: numbers that each token is multiplied with; ``kv_bytes``: of a token."""

    parameters: int
    n_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """``bandwidth``: bytes a second; ``flops``: floating point operations a second."""

    bandwidth: float
    flops: float

    def prefill(self, weights: Weights) -> float:
        """Most tokens a second; attention, which is left out, makes it less."""
        return self.flops / (2 * weights.parameters)

    def decode(self, weights: Weights, requests: int, context: float) -> float:
        """Most tokens per second of ``requests`` requests together, each with ``context`` tokens in its KV cache."""
        read = (weights.n_bytes + requests * context * weights.kv_bytes) / self.bandwidth
        return requests / max(read, requests / self.prefill(weights))


def benchmark(
    infer: Infer, running: RunningVllm, model: Model, stats: Mapping[str, Any], spec: JobSpec, notify: Notify
) -> Mapping[str, Any]:
    """What ``Benchmarked.benchmark`` returns, for a loaded engine. Raises :class:`InvalidModel` when a row fails."""
    config = running.config
    random = np.random.default_rng(0)

    def ask(prompts: int, tokens: int, answer: int) -> float:
        ids = random.integers(0, config.model_config.get_vocab_size(), (prompts, tokens), dtype=np.int32)
        flat = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), tokens)
        batch = RowBatch(np.arange(prompts, dtype=np.int64), pa.RecordBatch.from_arrays([flat], ["tokens"]))
        sampling = {"temperature": 0, "max_tokens": answer, "min_tokens": answer, "ignore_eos": True}
        change = {"prompt": None, "prompt_token_column": "tokens", "sampling": sampling, "order": "input"}
        began = time.monotonic()
        for results in infer(spec.model_copy(update=change), [batch], Cancellation()):
            for failure in results.failures:
                raise InvalidModel(f"it cannot be measured: {failure.message}", field="model")
        return time.monotonic() - began

    cached = (config.cache_config.num_gpu_blocks or 0) * (config.cache_config.block_size or 0)
    weights = None if model.path is None else weights_of(model.path, config)
    machine = None
    if weights is not None and config.parallel_config.world_size == 1:
        notify("measuring the machine")
        machine = machine_of(stats["device"], config.model_config.dtype, weights.n_bytes)
    notify("measuring the model")
    speeds = list(
        measure(
            ask,
            context=config.model_config.max_model_len,
            most_requests=config.scheduler_config.max_num_seqs,
            cache_tokens=cached,
            weights=weights,
            machine=machine,
        )
    )
    return {
        "chosen": summary(speeds),
        "speeds": speeds,
        "startup_seconds": stats["startup_seconds"],
        "kv_cache_tokens": cached,
        "settings": stats["settings"],
        "device": stats["device"],
        "weights": None if weights is None else asdict(weights),
        "machine": None if machine is None else asdict(machine),
    }


def measure(
    ask: Ask, *, context: int, most_requests: int, cache_tokens: int, weights: Weights | None, machine: Machine | None
) -> Iterator[dict[str, Any]]:
    """The rows of the table, as they are measured. ``context``: of the model; ``cache_tokens``: of the KV cache."""
    ask(min(8, most_requests), CONTEXT, SHORT)  # warm
    known = weights is not None and machine is not None
    per_token = 0.0
    for tokens in PREFILL_TOKENS:
        if tokens + 1 > context or tokens > cache_tokens:
            break
        once = ask(1, tokens, 1)
        count = max(1, min(int(SECONDS / once), cache_tokens // tokens))
        seconds = min(ask(count, tokens, 1) for _ in range(REPEATS))
        per_token = seconds / (count * tokens)
        limit = machine.prefill(weights) if known and machine and weights else None
        yield _row("prefill", count, tokens, count * tokens / seconds, limit)
    per_answer = 0.0
    for requests in CONCURRENCIES:
        room = min(context - CONTEXT, cache_tokens // requests - CONTEXT) - 1
        if requests > most_requests or room < 2 * SHORT:
            break
        longer = min(room, 8 * SHORT)
        if requests * (CONTEXT * per_token + longer * per_answer) > MOST_SECONDS:
            break
        step = max(1e-6, (ask(requests, CONTEXT, longer) - ask(requests, CONTEXT, SHORT)) / (longer - SHORT))
        longer = max(2 * SHORT, min(room, SHORT + int(SECONDS / step)))
        fastest = [min(ask(requests, CONTEXT, answer) for _ in range(REPEATS)) for answer in (SHORT, longer)]
        more = fastest[1] - fastest[0]
        per_answer = max(more, 1e-6) / (requests * (longer - SHORT))
        held = CONTEXT + (SHORT + longer) / 2
        limit = machine.decode(weights, requests, held) if known and machine and weights else None
        yield _row("decode", requests, CONTEXT, requests * (longer - SHORT) / max(more, 1e-6), limit)


def _row(what: str, requests: int, prompt: int, speed: float, limit: float | None) -> dict[str, Any]:
    return {
        "what": what,
        "requests": requests,
        "prompt_tokens": prompt,
        "tokens_per_second": round(speed, 1),
        "limit": None if limit is None else round(limit, 1),
        "share": None if not limit else round(speed / limit, 3),
    }


def weights_of(folder: Path, config: Any) -> Weights | None:
    """From the headers of the safetensors files, in the type that vLLM loaded them in; ``None`` where that is unknown.

    The input embedding, of which a token reads one row, is left out, unless it is also the output layer. Quantized
    weights and mixtures of experts are unknown: of the one the files, of the other the experts in use do not say it.
    """
    text = config.model_config.hf_text_config
    if config.quant_config is not None or getattr(text, "num_local_experts", getattr(text, "num_experts", None)):
        return None
    sizes: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with suppress(InvalidModel):
            sizes |= {name: math.prod(shape) for name, shape in tensor_shapes(file).items()}
    tied = bool(getattr(text, "tie_word_embeddings", False))
    read = {name: n for name, n in sizes.items() if tied or ("embed_tokens" not in name and "wte" not in name)}
    if not read:
        return None
    parameters = sum(read.values())
    width = config.model_config.dtype.itemsize
    layers = config.model_config.get_num_layers(config.parallel_config)
    heads = config.model_config.get_total_num_kv_heads() * config.model_config.get_head_size()
    return Weights(parameters, parameters * width, 2 * layers * heads * width)


def machine_of(device: str, dtype: Any, n_bytes: int) -> Machine | None:
    """Measured now, on the first device of that type; ``None`` where there is no room for it."""
    import torch

    def seconds(call: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(2 + 2 * REPEATS):
            began = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        return best

    try:
        block = torch.ones(min(max(n_bytes, _BLOCK[0]), _BLOCK[1]) // 4, dtype=torch.float32, device=device)
        bandwidth = 4 * block.numel() / seconds(block.sum)
        del block
        left, right = (torch.ones(_MATRIX, _MATRIX, dtype=dtype, device=device) for _ in range(2))
        flops = 2 * _MATRIX**3 / seconds(lambda: left @ right)
    except RuntimeError:
        return None
    return Machine(bandwidth, flops)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """What it comes to, in a line."""
    kinds = {what: [row["tokens_per_second"] for row in rows if row["what"] == what] for what in ("prefill", "decode")}
    return ", ".join(f"{what} {max(speeds):,.0f} tokens/s" for what, speeds in kinds.items() if speeds)
