"""The engine options of vLLM that a job may set, and what each may hold.

Static, because the host that submits a job may not have vLLM installed. The tables are those of vLLM 0.32; a test holds
them against the installed release. What only vLLM can judge is judged by vLLM when the engine starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pipeline.engines.generation.validators import (
    FLAG,
    INT,
    TEXT,
    Check,
    at_least,
    or_none,
    refuse_wrong,
    unknown_name,
    within,
)
from pipeline.engines.vllm.options.option_types import OPTION_TYPES
from storage.errors import InvalidJob

OWN_OPTIONS: Mapping[str, Check] = MappingProxyType(
    {
        "window": at_least(1),
        "window_tokens": at_least(1),
        "stall_seconds": within("above 0", lambda value: value > 0),
        "recycle_bytes": at_least(1),
        "media_window_bytes": at_least(1),
        "max_audio_seconds": within("above 0", lambda value: value > 0),
        "max_video_seconds": within("above 0", lambda value: value > 0),
        "max_video_frames": at_least(1),
        "max_media_bytes": at_least(1),
    }
)
"""Engine options of our own."""

OWN_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "window": "most requests inside vLLM at a time; twice ``max_num_seqs``",
        "window_tokens": "most tokens of their prompts; four million, or twice what the cache holds where that is more",
        "stall_seconds": "an engine that has requests and takes no step for so long, or starts and does nothing, is "
        "ended and started again",
        "recycle_bytes": "host memory of the worker and its engine above which the engine is started again after a "
        "shard; four fifths of the machine's memory, if it was a tenth of that less after the first shard",
        "media_window_bytes": "most bytes of prepared images, sounds and videos inside vLLM; a sixteenth of the "
        "machine's memory, at most 4 GiB",
        "max_audio_seconds": "longest sound of a row; beyond, it is the row error ``media_too_long``",
        "max_video_seconds": "longest video of a row, likewise",
        "max_video_frames": "most frames of a video, likewise",
        "max_media_bytes": "most decoded bytes of a sound or a video, likewise",
    }
)
"""What they are, for people, with the defaults. (Those of media stand in :mod:`media_limits`.)"""

COUNT = at_least(1)
ENGINE_CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "max_num_seqs": COUNT,
        "max_num_batched_tokens": COUNT,
        "max_model_len": ('a whole number of at least 1, -1 or "auto"', lambda v: COUNT[1](v) or v in (-1, "auto")),
        "block_size": COUNT,
        "tensor_parallel_size": COUNT,
        "pipeline_parallel_size": COUNT,
        "data_parallel_size": COUNT,
        "kv_cache_memory_bytes": COUNT,
        "max_loras": COUNT,
        "gpu_memory_utilization": within("above 0 and at most 1", lambda value: 0 < value <= 1),
        "seed": INT,
        "quantization": or_none(TEXT),
        "tokenizer": TEXT,
        "enforce_eager": FLAG,
        "enable_prefix_caching": FLAG,
        "enable_chunked_prefill": FLAG,
        "trust_remote_code": FLAG,
        "disable_log_stats": FLAG,
    }
)
"""Options with a range of their own, or no plain type in vLLM; :data:`OPTION_TYPES` has the types of the others."""

ENGINE_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "model": "the job's own model is loaded",
        "model_weights": "the job's own model is loaded",
        "served_model_name": "nothing is served under a name",
        "runner": "the task decides it",
        "convert": "the task decides it",
        "io_processor_plugin": "generate and chat do not use one",
        "skip_tokenizer_init": "prompts and answers are text, so the tokenizer is needed",
        "enable_prompt_embeds": "prompts are text",
        "tokens_only": "prompts and answers are text",
        "mm_encoder_only": "the task generates text",
        "enable_return_routed_experts": "the experts that were chosen are not offered as a result column",
        "return_sampling_mask": "the sampling mask is not offered as a result column",
        "enable_trace_replay": "replaying given tokens is not offered",
        "stream_interval": "Rowmill sets it: a row is written when it is finished",
        "max_num_queued_reqs": "the window bounds what is queued",
        "max_num_queued_tokens": "the window bounds what is queued",
        "data_parallel_rank": "Rowmill starts the whole engine",
        "data_parallel_external_lb": "Rowmill starts the whole engine",
        "data_parallel_multi_port_external_lb": "Rowmill starts the whole engine",
    }
)
"""Fields of ``AsyncEngineArgs`` that exist but are not a job's to set, and why."""

_ENGINE_FIELDS = """
additional_config aggregate_engine_logging all2all_backend allow_deprecated_quantization allowed_local_media_path
allowed_media_domains async_scheduling attention_backend attention_config aux_output_config block_size code_revision
collect_detailed_traces compilation_config config_format convert cp_kv_cache_interleave_size
cpu_distributed_timeout_seconds cpu_offload_gb cpu_offload_params cudagraph_capture_sizes cudagraph_metrics
custom_histogram_buckets data_parallel_address data_parallel_backend data_parallel_external_lb
data_parallel_hybrid_lb data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port
data_parallel_size data_parallel_size_local data_parallel_start_rank dbo_decode_token_threshold
dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
decode_context_parallel_size default_mm_loras device_ids diffusion_config disable_cascade_attn
disable_chunked_mm_input disable_custom_all_reduce disable_hybrid_kv_cache_manager disable_log_stats
disable_nccl_for_dp_synchronization disable_sliding_window distributed_executor_backend distributed_timeout_seconds
download_dir dp_sync_interval dtype ec_manager_config ec_transfer_config elastic_ep_max_dp_size
enable_batch_sharded_sampling enable_chunked_prefill enable_cumem_allocator enable_dbo enable_elastic_ep
enable_ep_weight_filter enable_eplb enable_expert_parallel enable_fault_tolerance enable_flashinfer_autotune
enable_hc_sp enable_layerwise_nvtx_tracing enable_log_requests enable_logging_iteration_details enable_lora
enable_mamba_cache_stochastic_rounding enable_mamba_shared_prefix_checkpoint enable_mfu_metrics
enable_mixed_moe_lora_format enable_mm_embeds enable_mm_processor_stats enable_moe_shared_loras
enable_nccl_comm_suspend enable_prefix_caching enable_prompt_embeds enable_return_routed_experts
enable_shm_tensor_arena enable_sleep_mode enable_tower_connector_lora enable_trace_replay enforce_eager
engram_config eplb_config expert_placement_strategy fail_on_environ_validation fault_tolerance_config
fully_sharded_loras gdn_prefill_backend generation_config gpu_memory_utilization hf_config_path hf_overrides
hf_token ignore_patterns interleave_mm_strings io_processor_plugin ir_op_priority jit_monitor_mode
jit_monitor_verbose kda_decode_backend kda_prefill_backend kernel_config kv_cache_dtype kv_cache_dtype_skip_layers
kv_cache_memory_bytes kv_cache_metrics kv_cache_metrics_sample kv_events_config kv_offloading_backend
kv_offloading_size kv_sharing_fast_prefill kv_transfer_config language_model_only limit_mm_per_prompt linear_backend
load_format log_config_file log_level logging_config logits_processors logprobs_mode long_prefill_token_threshold
long_prefill_token_threshold_adaptive lora_dtype lora_target_modules mamba_backend mamba_block_size
mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm
master_addr master_port max_cpu_loras max_cudagraph_capture_size max_logprobs max_lora_cls_labels max_lora_rank
max_loras max_model_len max_num_active_seqs max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens
max_num_scheduled_tokens max_num_seqs max_parallel_loading_workers media_io_kwargs mm_device_do_normalize
mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin
mm_encoder_fp8_scale_save_path mm_encoder_only mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb
mm_processor_cache_gb mm_processor_cache_type mm_processor_device mm_processor_kwargs
mm_shm_cache_max_object_size_mb mm_tensor_ipc model model_class_overrides model_impl model_loader_extra_config
model_weights moe_backend nnodes node_rank num_gpu_blocks_override numa_bind numa_bind_cpus numa_bind_nodes
offload_backend offload_group_size offload_num_in_group offload_params offload_prefetch_step optimization_level
otlp_traces_endpoint override_generation_config per_request_spec_decode_metrics performance_mode
pipeline_parallel_size pooler_config prefill_context_parallel_size prefill_schedule_interval
prefix_cache_retention_interval prefix_caching_hash_algo prefix_match_unit profiler_config pt_load_map_location
quantization quantization_config ray_workers_use_nsight reasoning_config reasoning_parser reasoning_parser_plugin
renderer_num_workers replayssm_buffer_len return_sampling_mask revision runner safetensors_load_strategy
safetensors_prefetch_block_size safetensors_prefetch_num_threads scheduler_cls scheduler_reserve_full_isl
scheduling_policy seed served_model_name show_hidden_metrics_for_version shutdown_timeout skip_mm_profiling
skip_tokenizer_init sleep_mode_offload_cudagraph sleep_preserve_parameter_names sparse_indexer_topk_backend
spec_method spec_model spec_tokens specialize_active_lora speculative_config stream_interval
structured_outputs_config swa_bounded_replay tensor_parallel_size tokenizer tokenizer_mode tokenizer_revision
tokens_only trust_remote_code ubatch_size use_fp64_gumbel use_replayssm use_tqdm_on_load video_pruning_method
video_pruning_rate watermark watermark_config weight_transfer_config worker_cls worker_extension_cls
"""
ENGINE_FIELDS = frozenset(_ENGINE_FIELDS.split())
"""Every public field of ``AsyncEngineArgs``."""


def check_engine_options(options: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidJob` for an engine option that neither vLLM nor this engine has."""
    for name, value in options.items():
        field = f"engine_options.{name}"
        if name in ENGINE_REFUSED:
            raise InvalidJob(f"not a job's to set: {ENGINE_REFUSED[name]}", field=field)
        if name not in ENGINE_FIELDS and name not in OWN_OPTIONS:
            known = (ENGINE_FIELDS - ENGINE_REFUSED.keys()) | OWN_OPTIONS.keys()
            raise InvalidJob(unknown_name("engine options", name, known), field=field)
        check = OWN_OPTIONS.get(name) or ENGINE_CHECKS.get(name) or OPTION_TYPES.get(name)
        if check is not None:
            refuse_wrong(field, check, value)
