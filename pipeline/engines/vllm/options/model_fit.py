"""Whether vLLM's engine options fit each other and the model: what its ``config.json`` can tell, before anything loads.

Static like :mod:`vllm_options`, for the same reason. Only what vLLM 0.32 is certain to refuse is refused here; what
depends on the machine (memory, number of GPUs) is for the worker that loads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipeline.models.model import Model
from storage.errors import InvalidJob

CHOICES: Mapping[str, tuple[str, ...]] = {
    "dtype": ("auto", "half", "float16", "bfloat16", "float", "float32"),
    "kv_cache_dtype": (
        "auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla", "nvfp4_ds_mla",
        "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc", "ultraquant_4bit",
        "int4_per_token_head", "int8_per_token_head", "fp8_per_token_head", "nvfp4", "nvfp4_4over6",
    ),
    "performance_mode": ("balanced", "interactivity", "throughput"),
    "scheduling_policy": ("fcfs", "priority"),
}  # fmt: skip
MAPPINGS = ("speculative_config", "kv_transfer_config", "hf_overrides", "override_generation_config")
ALLOW_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"


def validate_model_config(model: Model, options: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidJob`, naming the option, for what vLLM would refuse only after minutes of loading."""
    for name, choices in CHOICES.items():
        if name in options and options[name] not in choices:
            raise _refuse(name, f"must be one of {', '.join(choices)}, not {options[name]!r}")
    for name in MAPPINGS:
        if options.get(name) is not None and not isinstance(options[name], Mapping):
            raise _refuse(name, f"must be a mapping, not {options[name]!r}")
    _check_batch(options)
    # Overrides change what the configuration file says.
    if model.config and "hf_overrides" not in options:
        config = model.config.get("text_config") or model.config
        _check_length(config, options)
        _check_parallel(config, options)


def _refuse(name: str, why: str) -> InvalidJob:
    return InvalidJob(why, field=f"engine_options.{name}")


def _check_batch(options: Mapping[str, Any]) -> None:
    tokens, requests = options.get("max_num_batched_tokens"), options.get("max_num_seqs")
    if tokens is not None and requests is not None and tokens < requests:
        raise _refuse(
            "max_num_batched_tokens",
            f"{tokens} is less than max_num_seqs, {requests}: each request needs one token a step",
        )
    length, whole = options.get("max_model_len"), options.get("enable_chunked_prefill") is False
    if whole and tokens is not None and isinstance(length, int) and tokens < length:
        raise _refuse(
            "max_num_batched_tokens",
            f"{tokens} is less than max_model_len, {length}: without chunked prefill a prompt has to fit into one step",
        )


def _check_length(config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    wanted, most = options.get("max_model_len"), config.get("max_position_embeddings")
    if not isinstance(wanted, int) or not isinstance(most, int) or os.environ.get(ALLOW_LONG, "0") not in ("0", ""):
        return
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, Mapping) else "scaled"
    own = config.get("model_max_length")
    if kind == "default" and wanted > most and not (isinstance(own, int) and wanted <= own):
        raise _refuse(
            "max_model_len",
            f"the model was made for {most} tokens (max_position_embeddings in its config.json), not {wanted}",
        )


def _check_parallel(config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    ways, heads = options.get("tensor_parallel_size", 1), config.get("num_attention_heads")
    if isinstance(heads, int) and heads % ways:
        raise _refuse(
            "tensor_parallel_size", f"the model's {heads} attention heads cannot be split over {ways} devices"
        )
    stages, layers = options.get("pipeline_parallel_size", 1), config.get("num_hidden_layers")
    if isinstance(layers, int) and stages > layers:
        raise _refuse("pipeline_parallel_size", f"the model has {layers} layers, too few for {stages} stages")
