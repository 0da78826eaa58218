"""Small image models with random weights, exported to ONNX in seconds: for the tests and the benchmarks.

They compute nothing of use; they have the files, the graph and the arithmetic of a real ViT or ResNet. Deterministic:
the same call writes the same weights.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = ("cat", "dog", "boat", "tree")
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    # DeiT-Ti (arXiv 2012.12877): 5.5 million parameters, 1.3 GFLOPs an image.
    "small": {
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 192,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    },
}
"""``image_size`` is the height and width of the input, in pixels."""


def build_vit(
    path: Path | str, *, head: bool = True, labels: Sequence[str] = LABELS, seed: int = 0, size: str = "tiny"
) -> Path:
    """Write a ViT as an ONNX graph with its files to the directory ``path``.

    With a ``head`` it classifies; without, it gives token states and a pooled vector. ``size`` is one of ``SIZES``;
    "small" has its weights beside the graph, for PyTorch.
    """
    transformers = _transformers()
    side = SIZES[size]["image_size"]
    config = transformers.ViTConfig(
        **SIZES[size],
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    kind = transformers.ViTForImageClassification if head else transformers.ViTModel
    outputs = ["logits"] if head else ["last_hidden_state", "pooler_output"]
    _export(kind, config, Path(path), outputs, side, seed, weights=size == "small")
    _recipe(Path(path), "ViTImageProcessor", size={"height": side, "width": side}, resample=2)
    return Path(path)


def build_resnet(path: Path | str, *, labels: Sequence[str] = LABELS, seed: int = 0) -> Path:
    """Write a ResNet classifier of two stages, as an ONNX graph with its files, to the directory ``path``."""
    transformers = _transformers()
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    _export(transformers.ResNetForImageClassification, config, Path(path), ["logits"], 48, seed)
    _recipe(Path(path), "ConvNextImageProcessor", size={"shortest_edge": 48}, resample=3, crop_pct=0.875)
    return Path(path)


def _export(
    kind: Any, config: Any, path: Path, outputs: list[str], side: int, seed: int, *, weights: bool = False
) -> None:
    import torch

    torch.manual_seed(seed)
    config.architectures = [kind.__name__]
    model = kind(config).eval()
    path.mkdir(parents=True, exist_ok=True)
    (model if weights else config).save_pretrained(path)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> tuple[Any, ...]:
            made = self.model(pixel_values=pixel_values)
            return tuple(getattr(made, name) for name in outputs)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Wrapped(),
            (torch.zeros(2, 3, side, side),),
            str(path / "model.onnx"),
            input_names=["pixel_values"],
            output_names=outputs,
            dynamic_axes={name: {0: "batch"} for name in ("pixel_values", *outputs)},
            dynamo=False,
        )


def _recipe(path: Path, kind: str, **more: Any) -> None:
    standard = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "rescale_factor": 1 / 255,
    }
    recipe = standard | {"image_processor_type": kind} | more
    (path / "preprocessor_config.json").write_text(json.dumps(recipe, indent=1))


def _transformers() -> Any:
    # Imported by name: its classes carry no types.
    return importlib.import_module("transformers")
