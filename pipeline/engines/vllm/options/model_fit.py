"""Which models vLLM can run, and whether its engine options fit each other and the model: what the model's files tell.

Static like :mod:`engine_args`, for the same reason. Only what vLLM 0.32 is certain to refuse is refused here; what
depends on the machine (memory, number of GPUs) is for the worker that loads it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidJob, InvalidModel

ALLOW_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
TOKEN_IDS = ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias")
"""Sampling parameters that name tokens of the model's vocabulary."""
MAX_LOGPROBS = 20
"""vLLM's default for its option ``max_logprobs``."""
ALL = -1
"""As a number of log probabilities: those of the whole vocabulary."""


def check_model(model: Model, spec: JobSpec, *, pools: bool) -> None:
    """Raises :class:`InvalidModel`. ``pools``: the task wants no text of it."""

    def refuse(what: str) -> InvalidModel:
        return InvalidModel(f"{model.name!r} {what}", field="model")

    if model.path is None:
        raise refuse("is built in; engine 'vllm' runs a model directory")
    if not model.architectures:
        if model.onnx_files or model.path.suffix == ".onnx":
            raise refuse("is an ONNX graph; it runs on engine 'onnx', with task embed, classify, score or tensor")
        raise refuse("has no config.json that names its architecture; vLLM needs one")
    kind = ", ".join(model.architectures)
    if not model.autoregressive and not pools:
        raise refuse(
            f"is a {kind}, which does not generate text; engine 'vllm' runs decoder language models (…ForCausalLM). "
            "Use task embed, classify or score with engine 'onnx'"
        )
    if model.config.get("is_encoder_decoder") and (spec.task is not Task.GENERATE or spec.audio_column is None):
        raise refuse(
            f"is a {kind} with an encoder and a decoder; of these, engine 'vllm' runs those that transcribe, with task "
            "generate, audio_column and a prompt for the decoder"
        )
    chosen = spec.engine_options.get("load_format", "auto") != "auto"
    if not chosen and model.path.is_dir() and not any(model.path.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in model.path.glob(pattern))
        if pickles:
            raise refuse(f"has pickled weights only ({pickles[0]}), which can run code; convert them to safetensors")


def validate_model_config(model: Model, options: Mapping[str, Any], sampling: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidJob`, naming the field, for what vLLM would refuse only after minutes of loading."""
    _check_batch(options)
    _check_sampling(model, sampling, options)
    # Overrides change what the configuration file says.
    if model.config and "hf_overrides" not in options:
        config = model.config.get("text_config") or model.config
        _check_length(config, options)
        _check_parallel(config, options)


def _check_sampling(model: Model, sampling: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidJob` for sampling that vLLM refuses with this model and these options, in every row."""
    config = (model.config or {}).get("text_config") or model.config or {}
    size = None if "hf_overrides" in options else config.get("vocab_size")
    most = options.get("max_logprobs")
    most = MAX_LOGPROBS if most is None else most
    for name in ("logprobs", "prompt_logprobs"):
        wanted = sampling.get(name)
        if wanted is not None and most >= 0 and (wanted > most or (wanted == ALL and most < (size or math.inf))):
            asked = "the whole vocabulary" if wanted == ALL else wanted
            raise InvalidJob(
                f"{asked} is more than the engine's limit, {most}; raise it with the engine option max_logprobs",
                field=f"sampling.{name}",
            )
    for name in TOKEN_IDS:
        beyond = [token for token in sampling.get(name) or () if isinstance(size, int) and int(token) >= size]
        if beyond:
            raise InvalidJob(
                f"token id {beyond[0]} is not in the model's vocabulary of {size} (vocab_size in its config.json)",
                field=f"sampling.{name}",
            )


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
