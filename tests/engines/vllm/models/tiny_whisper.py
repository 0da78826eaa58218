"""Writes a Whisper with random weights and the tiny Llama's tokenizer. It hears two seconds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from examples.tiny_llama import build_llama

PROMPT = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
SECONDS, MEL_BINS = 2, 16


def build_whisper(path: Path) -> Path:
    """The directory with the model, below ``path``."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")

    model = path / "whisper"
    tokenizer = transformers.AutoTokenizer.from_pretrained(build_llama(path / "text"))
    special = [f"{token}>" for token in PROMPT.split(">") if token]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = None
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=MEL_BINS,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50 * SECONDS,
        max_target_positions=64,
        init_std=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids(special[0]),
    )
    torch.manual_seed(3)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    transformers.WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=SECONDS).save_pretrained(model)
    (model / "processor_config.json").write_text(json.dumps({"processor_class": "WhisperProcessor"}))
    return model
