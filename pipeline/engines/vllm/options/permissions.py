"""Engine options of vLLM that run code, or reach beyond the job's own model: the operator's to allow, not a job's.

They import a class or a file by its name, unpickle weights, read or write places of their own, or open connections.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from pipeline.engines.base import Permissions

_CODE = "it names code to run"
_FILES = "it names files to read or to write"
_NET = "it opens connections, or listens"
OPERATORS: Mapping[str, str] = MappingProxyType(
    {
        "trust_remote_code": "it runs the code that comes with the model",
        "worker_cls": _CODE,
        "worker_extension_cls": _CODE,
        "scheduler_cls": _CODE,
        "logits_processors": _CODE,
        "model_class_overrides": _CODE,
        "reasoning_parser_plugin": _CODE,
        "tool_parser_plugin": _CODE,
        "additional_config": "it configures plug-ins of the platform",
        "kv_transfer_config": "it names code to run, and opens connections",
        "ec_transfer_config": "it names code to run, and opens connections",
        "ec_manager_config": _CODE,
        "weight_transfer_config": "it opens connections, and takes weights from there",
        "kv_events_config": _NET,
        "otlp_traces_endpoint": _NET,
        "data_parallel_address": _NET,
        "data_parallel_rpc_port": _NET,
        "master_addr": _NET,
        "master_port": _NET,
        "nnodes": _NET,
        "node_rank": _NET,
        "logging_config": _CODE,
        "log_config_file": _FILES,
        "profiler_config": _FILES,
        "allowed_local_media_path": "it lets prompts name files of the worker",
        "allowed_media_domains": "it lets prompts name addresses to fetch",
        "download_dir": _FILES,
        "hf_token": "it is a secret, and jobs are stored",
        "mm_encoder_fp8_scale_path": _FILES,
        "mm_encoder_fp8_scale_save_path": _FILES,
        "model_loader_extra_config": "it names other weights, and where they are fetched from",
    }
)
"""Options that are refused whatever they hold, and why."""

_PLACE = "it names a directory beside the model"
PLACES: Mapping[str, str] = MappingProxyType(
    {
        "default_mm_loras": _PLACE,
        "hf_config_path": _PLACE,
        "spec_model": _PLACE,
        "tokenizer": _PLACE,
    }
)
"""What names directories, from which data is read and nothing is run. On one's own machine they are one's own; in a
fleet they are the workers'."""

_LOADS = ("auto", "dummy", "fastsafetensors", "hf", "mistral", "safetensors", "sharded_state")
_EXECUTORS = ("mp", "ray", "uni")
_SPECULATIVE = frozenset(
    {"method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min", "disable_padded_drafter_batch"}
)
_COMPILATION = frozenset(
    {"mode", "level", "cudagraph_mode", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "compile_sizes"}
)
_STRUCTURED = frozenset(
    {"backend", "disable_any_whitespace", "disable_additional_properties", "reasoning_parser", "enable_in_reasoning"}
)


def _only(names: Collection[str]) -> Callable[[Any], str | None]:
    def reach(value: Any) -> str | None:
        if not isinstance(value, Mapping):
            return None if isinstance(value, int) else "it may name code or files"
        more = sorted(str(name) for name in value if name not in names)
        return f"its {', '.join(more)} may name code or files" if more else None

    return reach


def _one_of(known: Collection[str], else_: str) -> Callable[[Any], str | None]:
    return lambda value: None if value in known else else_


def _overrides(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return None
    return "its auto_map names code to run" if "auto_map" in str(value) else None


JUDGED: Mapping[str, Callable[[Any], str | None]] = MappingProxyType(
    {
        "load_format": _one_of(_LOADS, "it may unpickle weights, which runs code, or fetch them"),
        "distributed_executor_backend": _one_of(_EXECUTORS, _CODE),
        "speculative_config": _only(_SPECULATIVE),
        "compilation_config": _only(_COMPILATION),
        "structured_outputs_config": _only(_STRUCTURED),
        "generation_config": _one_of(("auto", "vllm"), _FILES),
        "hf_overrides": _overrides,
    }
)
"""Options of which it depends on the value: what is wrong with it, or ``None``."""


def check(options: Mapping[str, Any], permissions: Permissions) -> None:
    """Raise :class:`~storage.errors.InvalidJob` for an option that only the operator may allow, and has not."""
    for name, value in options.items():
        if value in (None, False, "", [], {}, ()) or (permissions.own_machine and name in PLACES):
            continue
        judge = JUDGED.get(name)
        why = OPERATORS.get(name) or PLACES.get(name) if judge is None else judge(value)
        if why is not None:
            permissions.require(name, why, field=f"engine_options.{name}")
