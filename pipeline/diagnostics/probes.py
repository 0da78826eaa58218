"""Engines tried for real, each in a process of its own.

Run as ``python -m pipeline.diagnostics.probes`` with ``onnx-providers``, ``onnx PROVIDER``, ``vllm`` or ``vllm-deep``.
A crash, a hang or a thread left behind by a native library stays in that process. The result is one JSON object on
stdout; everything that the libraries print goes to stderr.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADD_GRAPH = base64.b64decode(
    "CAgSADpCCg4KAXgKAXgSAXkiA0FkZBIGZG9jdG9yWhMKAXgSDgoMCAESCAoCCAIKAggDYhMKAXkSDgoMCAESCAoCCAIKAggDQgQKABAN"
)
"""An ONNX model, opset 13: ``y = x + x`` for a float32 [2, 3]. Bytes, so that the ``onnx`` package is not needed."""

_TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


def onnx(provider: str) -> dict[str, Any]:
    """Run a graph on ``provider`` alone; where its nodes really ran.

    ONNX Runtime hands over to the CPU without an error when a provider does not start, so the session's own list and
    the recorded placement are compared with what was asked (fallback is forbidden as well).
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import numpy as np
    import onnxruntime as ort

    from pipeline.diagnostics.engines import installed

    if any(name.startswith("onnxruntime-gpu") for name in installed("onnxruntime")):
        ort.preload_dlls()  # as the engine does: CUDA and cuDNN may be there as wheels only
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(ADD_GRAPH, options, providers=[provider])
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (y,) = session.run(None, {"x": x})
    placement = sorted({part.ep_name for part in session.get_provider_graph_assignment_info()})
    active = session.get_providers()
    ok = active[0] == provider and placement in ([provider], []) and np.array_equal(y, x + x)
    return {"ok": bool(ok), "version": ort.__version__, "active": active, "placement": placement}


def onnx_providers() -> dict[str, Any]:
    """The providers that this build of ONNX Runtime holds: what to try, not what works."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime as ort

    return {"ok": True, "version": ort.__version__, "providers": ort.get_available_providers()}


def vllm() -> dict[str, Any]:
    """Import vLLM; the platform that it found."""
    import torch
    import vllm as module
    from vllm.platforms import current_platform

    platform = type(current_platform).__name__.removesuffix("Platform").lower()
    return {
        "ok": platform != "unspecified",
        "version": module.__version__,
        "platform": platform,
        "device": current_platform.get_device_name() if platform == "cuda" else platform,
        "torch": torch.__version__,
    }


def vllm_deep() -> dict[str, Any]:
    """Start an engine on a one-layer model with random weights, and generate eight tokens."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    with tempfile.TemporaryDirectory(prefix="rowmill-doctor-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_TINY_LLAMA))
        began = time.monotonic()
        engine = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=2,
            gpu_memory_utilization=0.1,
            disable_log_stats=True,
        )
        ready = time.monotonic()
        sampling = SamplingParams(max_tokens=8, min_tokens=8, ignore_eos=True, detokenize=False)
        out = engine.generate([TokensPrompt(prompt_token_ids=[2, 3, 4])], sampling, use_tqdm=False)
        n_tokens = len(out[0].outputs[0].token_ids)
    return {"ok": n_tokens == 8, "tokens": n_tokens, "start_seconds": round(ready - began, 1)}


def main(arguments: list[str]) -> int:
    """Run one probe; its result, or the error's text, is printed as JSON."""
    result_fd = os.dup(1)
    os.dup2(2, 1)
    name, *rest = arguments
    probes: dict[str, Callable[..., dict[str, Any]]] = {
        "onnx": onnx,
        "onnx-providers": onnx_providers,
        "vllm": vllm,
        "vllm-deep": vllm_deep,
    }
    try:
        result = probes[name](*rest)
    except Exception as error:  # whatever a native library's Python side raises is the finding
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    os.write(result_fd, json.dumps(result).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
