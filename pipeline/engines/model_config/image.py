"""What the files beside an image model say about it: size, crop, scale and normalization of images, and the labels.

Reads ``preprocessor_config.json`` as Transformers' image processors write it. Those that resize, crop, rescale and
normalize are known; one that does anything else is refused, since a model fed in another way gives other answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engines.model_config.json_files import read_json
from pipeline.models.model import Model
from storage.errors import InvalidModel

CONFIG = "preprocessor_config.json"

_STANDARD = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ViT": _STANDARD | {"size": {"height": 224, "width": 224}, "resample": 2},
    "DeiT": _STANDARD
    | {
        "size": {"height": 256, "width": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "resample": 3,
    },
    "CLIP": _CLIP,
    "Bit": _CLIP,
    "Siglip": _STANDARD | {"size": {"height": 224, "width": 224}, "resample": 3},
    "ConvNext": _STANDARD | {"size": {"shortest_edge": 384}, "resample": 3, "crop_pct": 224 / 256},
}
"""What Transformers 5 fills in for keys that a file leaves out, by processor. The filters are Pillow's numbers."""

_ENDINGS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")
_SQUARE = ("ViT", "DeiT", "Siglip")
"""Processors whose ``size`` given as a number is a square; for the others it is the shorter edge."""


@dataclass(frozen=True, slots=True)
class ImageRecipe:
    """From an image to the model's input, in this order. ``None`` leaves a step out.

    ``size``: height and width to resize to; ``shortest``: the shorter edge instead, the other in proportion;
    ``resample``: Pillow's number of the filter; ``crop``: height and width of the middle that is kept; ``scale``:
    factor for the values 0…255; ``mean``, ``std``: for each of the three channels.
    """

    size: tuple[int, int] | None
    shortest: int | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """``config`` is ``config.json``."""

    root: Path
    config: Mapping[str, Any]
    recipe: ImageRecipe


def is_for_images(model: Model) -> bool:
    """Whether the model comes with a recipe for images."""
    return model.path is not None and (_root(model.path) / CONFIG).is_file()


def read(model: Model) -> ImageFolder:
    """Read the files around ``model``. Raises :class:`~storage.errors.InvalidModel` for damaged or unsupported ones."""
    assert model.path is not None
    root = _root(model.path)
    path = root / CONFIG
    return ImageFolder(root, read_json(root / "config.json") or dict(model.config), recipe(read_json(path), str(path)))


def _root(path: Path) -> Path:
    root = path if path.is_dir() else path.parent
    if path.is_file() and root.name == "onnx" and not (root / CONFIG).exists():
        return root.parent
    return root


def recipe(given: Mapping[str, Any], where: str) -> ImageRecipe:
    """The recipe of a ``preprocessor_config.json``; ``where`` names it in messages.

    Raises :class:`~storage.errors.InvalidModel` for an unknown processor, and for steps that are not done here.
    """
    name = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")
    kind = next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name)
    if kind not in _DEFAULTS:
        known = ", ".join(f"{name}ImageProcessor" for name in _DEFAULTS)
        raise InvalidModel(f"{where} asks for {name or 'no known image processor'}; engine 'onnx' does {known}")
    config = dict(_DEFAULTS[kind]) | {key: value for key, value in given.items() if value is not None}
    if config.get("do_pad"):
        raise InvalidModel(f"{where} asks for padding, which engine 'onnx' does not do")
    try:
        size = shortest = crop = None
        if config.get("do_resize", True):
            size, shortest = _size(config["size"], square=kind in _SQUARE)
        if config.get("do_center_crop", False):
            crop, edge = _size(config["crop_size"], square=True)
            crop = crop or (edge or 0, edge or 0)
        if kind == "ConvNext" and shortest is not None:
            # Small pictures are resized larger and cropped, large ones are warped (the processor's own rule).
            if shortest < 384:
                shortest, crop = int(shortest / float(config["crop_pct"])), (shortest, shortest)
            else:
                size, shortest = (shortest, shortest), None
        mean = std = None
        if config.get("do_normalize", True):
            mean, std = _three(config["image_mean"]), _three(config["image_std"])
        scale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        return ImageRecipe(size, shortest, int(config["resample"]), crop, scale, mean, std)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidModel(f"{where} cannot be used: {error!r}") from error


def _size(value: Any, *, square: bool) -> tuple[tuple[int, int] | None, int | None]:
    """Height and width, or the shorter edge."""
    match value:
        case int():
            return ((value, value), None) if square else (None, value)
        case {"height": int(height), "width": int(width)}:
            return (height, width), None
        case {"shortest_edge": int(edge), **rest} if not any(rest.values()):
            return None, edge
    raise ValueError(f"size {value!r}")


def _three(value: Any) -> tuple[float, ...]:
    numbers = tuple(float(number) for number in (value if isinstance(value, list | tuple) else [value] * 3))
    if len(numbers) != 3:
        raise ValueError(f"{len(numbers)} channels; images have three here")
    return numbers
