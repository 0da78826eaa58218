"""What type of value each of vLLM's engine options takes: those whose type in ``AsyncEngineArgs`` is a plain one.

Static, for the reason that :mod:`engine_args` gives; the tables are those of vLLM 0.32, and a test holds them against
the installed release. A value of another type would be refused only after minutes of loading, or taken for something
else: ``"no"`` for a flag counts as true.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pipeline.engines.generation.validators import FLAG, INT, MAPPING, NUMBER, TEXT, Check, or_none

_FLAGS = """
aggregate_engine_logging allow_deprecated_quantization async_scheduling cudagraph_metrics data_parallel_hybrid_lb
dcp_q_replicate disable_cascade_attn disable_chunked_mm_input disable_custom_all_reduce
disable_hybrid_kv_cache_manager disable_nccl_for_dp_synchronization disable_sliding_window
enable_batch_sharded_sampling enable_cumem_allocator enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb
enable_expert_parallel enable_fault_tolerance enable_flashinfer_autotune enable_hc_sp enable_layerwise_nvtx_tracing
enable_log_requests enable_logging_iteration_details enable_lora enable_mamba_cache_stochastic_rounding
enable_mamba_shared_prefix_checkpoint enable_mfu_metrics enable_mixed_moe_lora_format enable_mm_embeds
enable_mm_processor_stats enable_moe_shared_loras enable_nccl_comm_suspend enable_shm_tensor_arena enable_sleep_mode
enable_tower_connector_lora fail_on_environ_validation fully_sharded_loras interleave_mm_strings jit_monitor_verbose
kv_cache_metrics kv_sharing_fast_prefill language_model_only long_prefill_token_threshold_adaptive
mm_device_do_normalize numa_bind ray_workers_use_nsight scheduler_reserve_full_isl skip_mm_profiling
sleep_mode_offload_cudagraph specialize_active_lora swa_bounded_replay use_fp64_gumbel use_replayssm use_tqdm_on_load
"""
_WHOLE = """
cp_kv_cache_interleave_size cpu_distributed_timeout_seconds data_parallel_rpc_port data_parallel_size_local
data_parallel_start_rank dbo_decode_token_threshold dbo_prefill_token_threshold dcp_kv_cache_interleave_size
decode_context_parallel_size distributed_timeout_seconds dp_sync_interval elastic_ep_max_dp_size
long_prefill_token_threshold mamba_block_size mamba_cache_philox_rounds master_port max_cpu_loras
max_cudagraph_capture_size max_logprobs max_lora_cls_labels max_num_active_seqs max_num_scheduled_tokens
max_parallel_loading_workers mm_shm_cache_max_object_size_mb nnodes node_rank num_gpu_blocks_override
offload_group_size offload_num_in_group offload_prefetch_step prefill_context_parallel_size prefill_schedule_interval
prefix_cache_retention_interval prefix_match_unit renderer_num_workers replayssm_buffer_len
safetensors_prefetch_block_size safetensors_prefetch_num_threads shutdown_timeout spec_tokens ubatch_size
"""
_NUMBERS = """
cpu_offload_gb kv_cache_metrics_sample kv_offloading_size mm_encoder_fp8_scale_save_margin mm_ipc_gpu_memory_gb
mm_processor_cache_gb video_pruning_rate watermark
"""
_TEXTS = """
allowed_local_media_path code_revision config_format data_parallel_address download_dir generation_config
hf_config_path load_format log_config_file master_addr mm_encoder_attn_dtype mm_encoder_fp8_scale_path
mm_encoder_fp8_scale_save_path mm_processor_device model_impl offload_backend otlp_traces_endpoint reasoning_parser
reasoning_parser_plugin revision show_hidden_metrics_for_version spec_method spec_model tokenizer_revision
video_pruning_method worker_cls worker_extension_cls
"""
_MAPPINGS = """
additional_config custom_histogram_buckets default_mm_loras diffusion_config hf_overrides kv_transfer_config
limit_mm_per_prompt media_io_kwargs mm_processor_kwargs model_class_overrides model_loader_extra_config
override_generation_config speculative_config watermark_config
"""
CHOICES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "all2all_backend": ("naive", "pplx", "deepep_high_throughput", "deepep_low_latency", "deepep_v2",
            "mori_high_throughput", "mori_low_latency", "moonep", "nixl_ep", "allgather_reducescatter",
            "flashinfer_all2allv", "flashinfer_nvlink_two_sided", "flashinfer_nvlink_one_sided", "passthrough"),
        "data_parallel_backend": ("ray", "mp"),
        "dcp_comm_backend": ("ag_rs", "a2a", None),
        "dtype": ("auto", "half", "float16", "bfloat16", "float", "float32"),
        "expert_placement_strategy": ("linear", "round_robin"),
        "gdn_prefill_backend": ("flashinfer", "triton", "cutedsl", "aiter_flydsl", None),
        "jit_monitor_mode": ("warn", "error"),
        "kda_decode_backend": ("auto", "native", "flashinfer", "triton", None),
        "kda_prefill_backend": ("auto", "triton", "flashkda", "flashinfer", "fused", None),
        "kv_cache_dtype": ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc",
            "fp8_ds_mla", "nvfp4_ds_mla", "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc",
            "turboquant_3bit_nc", "ultraquant_4bit", "int4_per_token_head", "int8_per_token_head",
            "fp8_per_token_head", "nvfp4", "nvfp4_4over6"),
        "kv_offloading_backend": ("native", "lmcache"),
        "linear_backend": ("auto", "cutlass", "flashinfer_cutlass", "flashinfer_cutedsl", "flashinfer_trtllm",
            "flashinfer_cudnn", "flashinfer_b12x", "b12x", "marlin", "humming", "triton", "deep_gemm", "torch",
            "aiter", "machete", "fbgemm", "conch", "exllama", "emulation", "xpu", "xpu_woq"),
        "log_level": ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG", "NOTSET", None),
        "logprobs_mode": ("raw_logits", "raw_logprobs", "processed_logits", "processed_logprobs"),
        "mamba_cache_dtype": ("auto", "float32", "float16", "bfloat16"),
        "mamba_cache_mode": ("align", "none"),
        "mamba_ssm_cache_dtype": ("auto", "float32", "float16", "bfloat16"),
        "mamba_ssu_algorithm": ("auto", "simple", "vertical", "horizontal", None),
        "max_lora_rank": (1, 8, 16, 32, 64, 128, 256, 320, 512),
        "mm_encoder_tp_mode": ("weights", "data"),
        "mm_hasher_algorithm": ("blake3", "sha256", "sha512"),
        "mm_processor_cache_type": ("shm", "lru", None),
        "mm_tensor_ipc": ("direct_rpc", "torch_shm"),
        "moe_backend": ("auto", "triton", "batched_triton", "deep_gemm", "deep_gemm_mega_moe", "cutlass",
            "flashinfer_trtllm", "flashinfer_cutlass", "flashinfer_cutedsl", "flashinfer_moe_ep_cutedsl",
            "flashinfer_b12x", "b12x", "flashinfer_moe_ep_mega_deep_gemm", "marlin", "humming",
            "triton_unfused", "aiter", "aiter_mega_moe", "aiter_triton_mxfp4_bf16", "flydsl", "hpc",
            "emulation", "rdna3"),
        "per_request_spec_decode_metrics": ("none", "summary", "detailed"),
        "performance_mode": ("balanced", "interactivity", "throughput"),
        "prefix_caching_hash_algo": ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor"),
        "safetensors_load_strategy": ("lazy", "eager", "prefetch", "torchao", None),
        "scheduling_policy": ("fcfs", "priority"),
        "sparse_indexer_topk_backend": ("auto", "deep_select", "cooperative", "persistent", "per_row",
            "flashinfer", "torch", "aiter"),
    }
)  # fmt: skip
"""The options that take one of a few values."""


def _one_of(choices: tuple[Any, ...]) -> Check:
    return f"one of {', '.join(map(str, choices))}", lambda value: any(
        type(value) is type(choice) and value == choice for choice in choices
    )


OPTION_TYPES: Mapping[str, Check] = MappingProxyType(
    {
        **{
            name: or_none(check)
            for names, check in (
                (_FLAGS, FLAG),
                (_WHOLE, INT),
                (_NUMBERS, NUMBER),
                (_TEXTS, TEXT),
                (_MAPPINGS, MAPPING),
            )
            for name in names.split()
        },
        **{name: _one_of(choices) for name, choices in CHOICES.items()},
    }
)
"""By the option's name. Null stands for vLLM's default where it is not one of the choices."""
