"""What a MiniCPM-o checkpoint brings as its own code: configuration, picture processor, processor; for tiny_omni.py.

It is copied into the model's directory. vLLM's own classes for this model call the methods by these names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, SiglipVisionConfig, WhisperConfig
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin
from transformers.processing_utils import ImagesKwargs, ProcessorMixin

TOKENS = {
    "im_start_id": "<image>",
    "im_end_id": "</image>",
    "slice_start_id": "<slice>",
    "slice_end_id": "</slice>",
    "audio_start_id": "<audio>",
    "audio_end_id": "</audio>",
    "spk_start_id": "<spk>",
    "spk_end_id": "</spk>",
}

if not torch.cuda.is_available():
    # vLLM 0.32's resampler asks whether CUDA is capturing a graph, which PyTorch's build for CPUs refuses to answer.
    torch.cuda.is_current_stream_capturing = lambda: False


class OmniConfig(Qwen2Config):  # type: ignore[misc]
    model_type = "tiny_omni"

    def __init__(self, vision_config: Any = None, audio_config: Any = None, **rest: Any) -> None:
        self.vision_config = SiglipVisionConfig(**(vision_config or {}))
        self.audio_config = WhisperConfig(**(audio_config or {}))
        super().__init__(**rest)


class OmniImageProcessor(ImageProcessingMixin):  # type: ignore[misc]
    """Pictures made square, and cut into one row of patches: [3, patch, patch × patches]."""

    model_input_names = ["pixel_values"]
    valid_kwargs = ImagesKwargs
    max_slice_nums = 1
    im_start_token, im_end_token = "<image>", "</image>"

    def __init__(self, side: int = 28, patch_size: int = 14, image_feature_size: int = 4, **rest: Any) -> None:
        super().__init__(**rest)
        self.side, self.patch_size, self.image_feature_size = side, patch_size, image_feature_size

    def get_sliced_grid(self, size: Any, max_slice_nums: int | None = None) -> None:
        return None

    def get_slice_image_placeholder(
        self, size: Any, image_idx: int = 0, max_slice_nums: int | None = None, use_image_id: bool | None = None
    ) -> str:
        return "<image>" + "<unk>" * self.image_feature_size + "</image>"

    def __call__(self, images: Any, **ignored: Any) -> Any:
        rows = [[self._patches(image) for image in row] for row in images]
        across = self.side // self.patch_size
        return BatchFeature(
            {
                "pixel_values": rows,
                "image_sizes": [[(self.side, self.side) for _ in row] for row in rows],
                "tgt_sizes": [torch.tensor([[across, across]] * len(row), dtype=torch.int32) for row in rows],
            }
        )

    def _patches(self, image: Any) -> torch.Tensor:
        import PIL.Image

        picture = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(np.asarray(image))
        pixels = np.asarray(picture.convert("RGB").resize((self.side, self.side)), np.float32) / 127.5 - 1
        size, across = self.patch_size, self.side // self.patch_size
        cut = pixels.reshape(across, size, across, size, 3).transpose(4, 1, 0, 2, 3)
        return torch.from_numpy(np.ascontiguousarray(cut.reshape(3, size, across * across * size)))


class OmniProcessor(ProcessorMixin):  # type: ignore[misc]
    attributes = ["feature_extractor", "tokenizer"]
    feature_extractor_class = "WhisperFeatureExtractor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, feature_extractor: Any = None, tokenizer: Any = None, **ignored: Any) -> None:
        super().__init__(feature_extractor, tokenizer)
        for name, token in TOKENS.items():
            setattr(tokenizer, name, tokenizer.convert_tokens_to_ids(token))
