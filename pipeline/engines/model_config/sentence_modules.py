"""The modules of a sentence-transformers folder, read from its JSON: what becomes of the token states of a text.

Understood are Transformer, Pooling and, after it and in any order, Dense, LayerNorm, Normalize and Dropout. Everything
else is refused by name: a module that is left out would change every vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engines.model_config.json_files import read_json
from pipeline.engines.model_config.sentence_layers import (
    Dense,
    Layer,
    LayerNorm,
    Normalize,
    activation_name,
    check_weights,
)
from pipeline.models import module_folders
from storage.errors import InvalidModel

_LEGACY_POOLING = {  # sentence-transformers before 5.4, in the order in which the parts are concatenated
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_POOLING_NAMES = {"mean_sqrt_len_tokens": "mean_sqrt_len", "lasttoken": "last"}
_POOLINGS = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "last")
_TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_TRANSFORMER_TASKS = ("feature-extraction", "sequence-classification")
_PACKAGE = "sentence_transformers."
_RUNS = "Transformer, Pooling, Dense, LayerNorm, Normalize and Dropout"
_VECTOR = "sentence_embedding"
_INPUT_ARGUMENTS = ("processor_kwargs", "tokenizer_args")


@dataclass(frozen=True, slots=True)
class SentenceModules:
    """``weights``: the directory of the Transformer; ``settings``: its ``sentence_bert_config.json``; ``pooling``: the
    modes that are concatenated, ``None`` without a Pooling module; ``include_prompt``: whether they see the prompt;
    ``layers``: what follows, in order; ``normalize``: whether unit length comes last (no part of ``layers``)."""

    weights: Path
    settings: Mapping[str, Any]
    pooling: tuple[str, ...] | None = None
    include_prompt: bool = True
    layers: tuple[Layer, ...] = ()
    normalize: bool = False

    @property
    def max_length(self) -> int | None:
        """The limit in tokens that the module sets, which goes before the tokenizer's own."""
        for name in _INPUT_ARGUMENTS:
            limit = (self.settings.get(name) or {}).get("model_max_length")
            if isinstance(limit, int):
                return limit
        limit = self.settings.get("max_seq_length")
        return limit if isinstance(limit, int) and limit > 0 else None


def settings(folder: Path) -> dict[str, Any]:
    """What sentence-transformers keeps beside the weights of a Transformer, under one of several names."""
    return next((found for name in _TRANSFORMER_FILES if (found := read_json(folder / name))), {})


def read(root: Path) -> SentenceModules | None:
    """The modules of the folder; ``None`` without ``modules.json``.

    Raises :class:`~storage.errors.InvalidModel` for what is damaged or not understood.
    """
    modules = module_folders.read(root)
    if modules is None:
        return None
    names = [_name(root, kind) for kind, _ in modules]
    if names[1:2] not in ([], ["Pooling"]) and set(names[1:]) - {"Normalize", "Dropout"}:
        _refuse(root, names[1], "before Pooling")
    weights, pooling, include_prompt, layers = root, None, True, list[Layer]()
    width: int | None = None
    for at, (kind, folder) in enumerate(zip(names, (folder for _, folder in modules), strict=True)):
        if (kind == "Transformer") != (at == 0) or (kind == "Pooling" and pooling is not None):
            _refuse(root, kind, f"in place {at + 1}")
        match kind:
            case "Transformer":
                weights = folder
            case "Pooling":
                config = read_json(folder / "config.json")
                pooling = _pooling(config, folder)
                include_prompt = bool(config.get("include_prompt", True))
                size = config.get("embedding_dimension", config.get("word_embedding_dimension"))
                width = size * len(pooling) if isinstance(size, int) else None
            case "Dense" | "LayerNorm":
                layer = _dense(folder) if kind == "Dense" else _layer_norm(folder)
                if width is not None and layer.n_in != width:
                    raise InvalidModel(f"the module {folder.name} takes {layer.n_in} numbers, and gets {width}")
                check_weights(layer)
                layers.append(layer)
                width = layer.n_out
            case "Normalize":
                _of_vectors(kind, folder, read_json(folder / "config.json"))
                layers.append(Normalize())
            case "Dropout":
                pass  # it does something in training only
    normalize = bool(layers) and isinstance(layers[-1], Normalize)
    kept = tuple(layers[:-1] if normalize else layers)
    return SentenceModules(weights, _checked(settings(weights), root), pooling, include_prompt, kept, normalize)


def _name(root: Path, kind: str) -> str:
    name = kind.rsplit(".", 1)[-1]
    if not kind.startswith(_PACKAGE):  # a class of the same name elsewhere may do anything
        _refuse(root, kind, "")
    if name not in ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout"):
        _refuse(root, name, "")
    return name


def _refuse(root: Path, kind: str, where: str) -> None:
    raise InvalidModel(
        f"{root / 'modules.json'} has a module {kind}{' ' if where else ''}{where}, which engine 'onnx' does not run; "
        f"it runs {_RUNS}, in that order from the Transformer to Pooling, and then any"
    )


def _checked(found: dict[str, Any], root: Path) -> dict[str, Any]:
    """The Transformer's settings, if they ask for token states."""
    task = found.get("transformer_task") or _TRANSFORMER_TASKS[0]
    if task not in _TRANSFORMER_TASKS:
        raise InvalidModel(f"{root} uses its Transformer for {task!r}, which engine 'onnx' does not do")
    return found


def _pooling(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for key, name in _LEGACY_POOLING.items() if config.get(key)] or ["mean"]
    names = tuple(_POOLING_NAMES.get(mode, mode) for mode in ([modes] if isinstance(modes, str) else modes))
    if unknown := [name for name in names if name not in _POOLINGS]:
        raise InvalidModel(f"{folder / 'config.json'} asks for the unknown pooling {', '.join(map(str, unknown))}")
    return names


def _of_vectors(kind: str, folder: Path, config: Mapping[str, Any]) -> None:
    source = config.get("module_input_name") or _VECTOR
    target = config.get("module_output_name") or source
    if (source, target) != (_VECTOR, _VECTOR):
        raise InvalidModel(
            f"{folder / 'config.json'}: {kind} turns {source} into {target}, which engine 'onnx' does not do; "
            f"it applies layers to the {_VECTOR}"
        )


def _dense(folder: Path) -> Dense:
    path = folder / "config.json"
    config = read_json(path)
    _of_vectors("Dense", folder, config)
    return Dense(
        folder,
        _size(config, "in_features", path),
        _size(config, "out_features", path),
        bool(config.get("bias", True)),
        activation_name(str(config.get("activation_function", "torch.nn.Tanh")), path),
        bool(config.get("use_residual", False)),
    )


def _layer_norm(folder: Path) -> LayerNorm:
    path = folder / "config.json"
    return LayerNorm(folder, _size(read_json(path), "dimension", path))


def _size(config: Mapping[str, Any], name: str, path: Path) -> int:
    size = config.get(name)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InvalidModel(f"{path} says nothing of {name}, or no number above 0")
    return size
