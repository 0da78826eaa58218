"""Writes a BLIP-2 with random weights and the tiny Llama's tokenizer.

Of the multimodal models that vLLM knows, one of the few that need no torchvision (docs/adr/0004).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from examples.tiny_llama import CHAT_TEMPLATE, build_llama

IMAGE = "<image>"
PIXELS = 28
TOKENS = 4
"""Tokens that an image takes at the beginning of the prompt."""


def build_blip2(path: Path) -> Path:
    """The directory with the model, below ``path``."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    pillow: Any = importlib.import_module("transformers.models.blip.image_processing_pil_blip")

    tokenizer = transformers.AutoTokenizer.from_pretrained(build_llama(path / "text"))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = CHAT_TEMPLATE
    processor = transformers.Blip2Processor(
        image_processor=pillow.BlipImageProcessorPil(size={"height": PIXELS, "width": PIXELS}),
        tokenizer=tokenizer,
        num_query_tokens=TOKENS,
    )
    model = path / "blip2"
    processor.save_pretrained(model)
    tokenizer.save_pretrained(model)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide = {"initializer_range": 0.5}
    config = transformers.Blip2Config(
        vision_config={**small, **wide, "image_size": PIXELS, "patch_size": 14},
        qformer_config={**small, **wide, "encoder_hidden_size": 64, "vocab_size": 100, "cross_attention_frequency": 2},
        text_config={
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
            "init_std": 0.5,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        num_query_tokens=TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        initializer_range=0.5,
    )
    torch.manual_seed(5)
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(model)
    return model
