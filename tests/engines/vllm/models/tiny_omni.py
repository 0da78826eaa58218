"""Writes a MiniCPM-o with random weights and the tiny Llama's tokenizer: it takes images, videos and sounds.

Of the models that vLLM knows, the one that takes all three and needs no torchvision (docs/adr/0004).
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

from examples.tiny_llama import CHAT_TEMPLATE, build_llama

IMAGE, VIDEO, AUDIO = "(<image>./</image>)", "(<video>./</video>)", "(<audio>./</audio>)"
"""How a prompt names their places."""
SIDE, PATCH, FRAME_TOKENS = 28, 14, 4
RATE = 16_000
"""Hz: what the model hears."""
MEL_BINS, WIDTH, TOWER = 16, 128, 64
_MADE = Path(__file__).with_name("tiny_omni_code.py")


def build_omni(path: Path) -> Path:
    """The directory with the model, below ``path``."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    code: Any = importlib.import_module("tests.engines.vllm.models.tiny_omni_code")
    save: Any = importlib.import_module("safetensors.torch").save_file

    model = path / "omni"
    tokenizer = transformers.AutoTokenizer.from_pretrained(build_llama(path / "text"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unk>", *code.TOKENS.values()]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    vision = {
        "hidden_size": TOWER, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    audio = {
        "d_model": TOWER, "encoder_ffn_dim": 4 * TOWER, "encoder_layers": 2, "encoder_attention_heads": 2,
        "num_mel_bins": MEL_BINS, "max_source_positions": 1500, "init_std": 0.3,
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(5)
    weights = _named("llm", transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text)))
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision, vision_use_head=False))
    weights |= {name.replace("vpm.vision_model.", "vpm."): weight for name, weight in _named("vpm", siglip).items()}
    whisper = importlib.import_module("transformers.models.whisper.modeling_whisper")
    weights |= _named("apm", whisper.WhisperEncoder(transformers.WhisperConfig(**audio)))
    shapes = {
        "audio_projection_layer.linear1.weight": (WIDTH, TOWER),
        "audio_projection_layer.linear1.bias": (WIDTH,),
        "audio_projection_layer.linear2.weight": (WIDTH, WIDTH),
        "audio_projection_layer.linear2.bias": (WIDTH,),
        "resampler.query": (FRAME_TOKENS, WIDTH),
        "resampler.kv_proj.weight": (WIDTH, TOWER),
        "resampler.attn.in_proj_weight": (3 * WIDTH, WIDTH),
        "resampler.attn.in_proj_bias": (3 * WIDTH,),
        "resampler.attn.out_proj.weight": (WIDTH, WIDTH),
        "resampler.attn.out_proj.bias": (WIDTH,),
        "resampler.proj": (WIDTH, WIDTH),
    } | {f"resampler.{norm}.{part}": (WIDTH,) for norm in ("ln_q", "ln_kv", "ln_post") for part in ("weight", "bias")}
    weights |= {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    save(weights, model / "model.safetensors", {"format": "pt"})
    config = text | {
        "architectures": ["MiniCPMO"],
        "model_type": "tiny_omni",
        "auto_map": {"AutoConfig": "omni_code.OmniConfig"},
        "version": "2.6",
        "vision_config": vision,
        "audio_config": audio,
        "query_num": FRAME_TOKENS,
        "image_size": SIDE,
        "max_slice_num": 1,
        "drop_vision_last_layer": False,
        "audio_pool_step": 2,
        "audio_chunk_length": 1.0,
    }
    _write(model / "config.json", config)
    heard = transformers.WhisperFeatureExtractor(feature_size=MEL_BINS, sampling_rate=RATE).to_dict()
    seen = {"side": SIDE, "patch_size": PATCH, "image_feature_size": FRAME_TOKENS}
    classes = {"AutoImageProcessor": "omni_code.OmniImageProcessor", "AutoProcessor": "omni_code.OmniProcessor"}
    _write(model / "preprocessor_config.json", {**heard, **seen, "auto_map": classes})
    _write(model / "processor_config.json", {"auto_map": classes})
    shutil.copy(_MADE, model / "omni_code.py")
    return model


def _named(prefix: str, module: Any) -> dict[str, Any]:
    return {f"{prefix}.{name}": weight.contiguous().clone() for name, weight in module.state_dict().items()}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, default=list))
