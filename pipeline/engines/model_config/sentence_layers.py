"""Numpy: the layers that sentence-transformers applies to a pooled vector, with their weights from safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engines.pooling import Floats, unit_length
from pipeline.models.module_folders import LAYER_WEIGHTS
from storage.errors import EngineMissing, InvalidModel

_EPSILON = 1e-5
"""PyTorch's default for LayerNorm; the folder does not record another."""
_MOST_HEADER_BYTES = 2**27


def _erf(x: Floats) -> Any:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _logistic(x: Any) -> Any:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _softplus(x: Any) -> Any:
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def _exp_below_zero(x: Any) -> Any:
    return np.expm1(np.minimum(x, 0))


# PyTorch's activations with their default arguments: sentence-transformers stores the name alone. Input is float64.
_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "ReLU6": lambda x: np.clip(x, 0, 6),
    "LeakyReLU": lambda x: np.where(x > 0, x, 0.01 * x),
    "ELU": lambda x: np.where(x > 0, x, _exp_below_zero(x)),
    "CELU": lambda x: np.where(x > 0, x, _exp_below_zero(x)),
    "SELU": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * _exp_below_zero(x)),
    "GELU": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "Sigmoid": _logistic,
    "LogSigmoid": lambda x: -_softplus(-x),
    "SiLU": lambda x: x * _logistic(x),
    "Mish": lambda x: x * np.tanh(_softplus(x)),
    "Softplus": _softplus,
    "Softsign": lambda x: x / (1.0 + np.abs(x)),
    "Hardtanh": lambda x: np.clip(x, -1, 1),
    "Hardsigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "Hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Tanhshrink": lambda x: x - np.tanh(x),
}
_TORCH_NAME = re.compile(r"^torch\.nn\.(?:modules\.\w+\.)?(\w+)$")


def activation_name(named: str, where: Path) -> str:
    """The activation behind a name such as ``torch.nn.modules.activation.Tanh``. Nothing is imported.

    Raises :class:`~storage.errors.InvalidModel` for a function that is not in the list.
    """
    match = _TORCH_NAME.match(named)
    if match is None or match[1] not in _ACTIVATIONS:
        raise InvalidModel(
            f"{where} names the activation {named}, which engine 'onnx' does not run; "
            f"it runs torch.nn's {', '.join(_ACTIVATIONS)}"
        )
    return match[1]


@dataclass(frozen=True, slots=True)
class Dense:
    """``activation(x @ weight.T + bias)``, and with ``residual`` the input (or its projection) added."""

    folder: Path
    n_in: int
    n_out: int
    bias: bool
    activation: str
    residual: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights by name, and their shapes."""
        found: dict[str, tuple[int, ...]] = {"linear.weight": (self.n_out, self.n_in)}
        if self.bias:
            found["linear.bias"] = (self.n_out,)
        if self.residual and self.n_in != self.n_out:
            found["residual.weight"] = (self.n_out, self.n_in)
        return found

    def apply(self, x: Floats, weights: Mapping[str, Floats]) -> Floats:
        """Vectors float32 [k, n_out] from [k, n_in]."""
        linear = x @ weights["linear.weight"].T
        if self.bias:
            linear += weights["linear.bias"]
        if self.activation == "Identity":
            y = linear
        else:
            with np.errstate(over="ignore", invalid="ignore"):  # a vector that is no number is its row's error
                y = np.asarray(_ACTIVATIONS[self.activation](linear.astype(np.float64)), np.float32)
        if self.residual:
            y = y + (x if self.n_in == self.n_out else x @ weights["residual.weight"].T)
        return np.asarray(y, np.float32)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Each vector to mean 0 and variance 1, then scaled and shifted by number."""

    folder: Path
    n_in: int

    @property
    def n_out(self) -> int:
        """The width does not change."""
        return self.n_in

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights by name, and their shapes."""
        return {"norm.weight": (self.n_in,), "norm.bias": (self.n_in,)}

    def apply(self, x: Floats, weights: Mapping[str, Floats]) -> Floats:
        """Vectors float32 [k, n_in] from [k, n_in]."""
        wide = x.astype(np.float64)
        centred = wide - wide.mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + _EPSILON)
        return np.asarray(scaled * weights["norm.weight"] + weights["norm.bias"], np.float32)


@dataclass(frozen=True, slots=True)
class Normalize:
    """Each vector to unit length, in the middle of other layers."""

    def apply(self, x: Floats, weights: Mapping[str, Floats]) -> Floats:
        """Vectors float32 [k, d] from [k, d]."""
        return unit_length(x)


Layer = Dense | LayerNorm | Normalize


def check_weights(layer: Dense | LayerNorm) -> None:
    """Compare the weights beside ``layer`` with its configuration; only the header of their file is read.

    Raises :class:`~storage.errors.InvalidModel` when they are missing, in a pickle, or of other shapes.
    """
    path, kind = layer.folder / LAYER_WEIGHTS, type(layer).__name__
    if not path.is_file():
        if (pickled := layer.folder / "pytorch_model.bin").is_file():
            raise InvalidModel(
                f"the module {kind} keeps its weights only in {pickled}, a pickle, which can run code when it is "
                "loaded; save the model again with sentence-transformers (save_pretrained), which writes "
                f"{LAYER_WEIGHTS}, and try again"
            )
        raise InvalidModel(f"the module {kind} has no weights: {path} is missing")
    found = tensor_shapes(path)
    for name, shape in layer.shapes().items():
        if found.get(name) != shape:
            there = "is missing" if name not in found else f"has shape {list(found[name])}"
            raise InvalidModel(f"{path}: {name} {there}; the module's config.json asks for {list(shape)}")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file by name. It begins with the length of a JSON object, in 8 bytes, and the object.

    Raises :class:`~storage.errors.InvalidModel` for another file.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(min(size, _MOST_HEADER_BYTES)))
        return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidModel(f"{path} is not a safetensors file: {error}") from error


def load(layers: Sequence[Layer]) -> Callable[[Floats], Floats]:
    """Read the weights; returns a function from pooled vectors, float32 [k, d], to the model's own, float32 [k, d'].

    Raises :class:`~storage.errors.InvalidModel` for weights that cannot be read, and
    :class:`~storage.errors.EngineMissing` without the package safetensors.
    """
    loaded = [(layer, {} if isinstance(layer, Normalize) else _weights(layer)) for layer in layers]

    def apply(x: Floats) -> Floats:
        for layer, weights in loaded:
            x = layer.apply(x, weights)
        return x

    return apply


def _weights(layer: Dense | LayerNorm) -> dict[str, Floats]:
    try:
        import ml_dtypes  # noqa: F401 - gives numpy the type bfloat16
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise EngineMissing(f"{error.name} is not installed; install rowmill[onnx]") from error
    check_weights(layer)
    path = layer.folder / LAYER_WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InvalidModel(f"{path} cannot be read: {error}") from error
    return {name: np.asarray(tensors[name], np.float32) for name in layer.shapes()}
