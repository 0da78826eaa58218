"""Writes a LoRA adapter with random weights for the tiny Llama, in the layout that PEFT saves."""

from __future__ import annotations

import json
from pathlib import Path

from examples.tiny_llama import SIZES

RANK = 4


def build_adapter(path: Path, seed: int, rank: int = RANK) -> Path:
    """An adapter of the query and value projections of every layer. Same seed, same files."""
    import torch
    from safetensors.torch import save_file

    size = SIZES["tiny"]
    hidden, heads = size["hidden_size"], size["num_attention_heads"]
    random = torch.Generator().manual_seed(seed)
    widths = {"q_proj": hidden, "v_proj": hidden // heads * 2}
    weights = {}
    for layer in range(size["num_hidden_layers"]):
        for name, width in widths.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(rank, hidden, generator=random) / 4
            weights[f"{stem}.lora_B.weight"] = torch.randn(width, rank, generator=random) / 4
    path.mkdir(parents=True)
    save_file(weights, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8 * rank, "target_modules": sorted(widths), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    return path
