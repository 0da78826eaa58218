"""What the files beside a text model say about it: tokenizer, length limit, pooling, normalization, labels, prompt.

Reads JSON only, so it is cheap enough for ``check``. Formats: a Transformers directory, a sentence-transformers
directory (versions 2 to 6), and a ``.onnx`` file with ``tokenizer.json`` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import json_text
from pipeline.models.model import Model
from storage.errors import InvalidModel

Activation = Literal["sigmoid", "softmax", "identity"]

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
_TOKENIZER_SOURCES = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
# Position ids of these start after the padding index, so two of the positions in the table are never used for text.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "luke")


@dataclass(frozen=True, slots=True)
class TextFolder:
    """``root`` is the model directory, ``weights`` the directory with ``config.json`` (below it in some old models)."""

    root: Path
    weights: Path
    config: Mapping[str, Any]
    tokenizer: Path | None
    convertible_tokenizer: bool
    max_length: int | None
    lower_case: bool
    pooling: tuple[str, ...] | None
    normalize: bool
    prompt: str
    sentence_transformer: bool

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(self.config.get("architectures") or ())

    @property
    def classifier(self) -> bool:
        return any(name.endswith("ForSequenceClassification") for name in self.architectures)

    @property
    def vocab_size(self) -> int | None:
        size = self.config.get("vocab_size")
        return size if isinstance(size, int) else None

    def label(self, index: int) -> str:
        """See :func:`label`."""
        return label(self.config, index)

    def score_activation(self) -> Activation:
        """What a cross-encoder applies to its one logit: what its configuration names, otherwise the sigmoid.

        The same default as sentence-transformers' ``CrossEncoder``. Raises :class:`~storage.errors.InvalidModel` for a
        function other than sigmoid and identity.
        """
        named = (self.config.get("sentence_transformers") or {}).get("activation_fn")
        named = named or self.config.get("sbert_ce_default_activation_function")
        match str(named).rsplit(".", 1)[-1] if named else "Sigmoid":
            case "Sigmoid":
                return "sigmoid"
            case "Identity":
                return "identity"
        raise InvalidModel(
            f"its configuration asks for the score activation {named}; sigmoid and identity are supported"
        )

    def class_activation(self, n_labels: int) -> Activation:
        """See :func:`class_activation`."""
        return class_activation(self.config, n_labels)


def label(config: Mapping[str, Any], index: int) -> str:
    """The name of an output class: ``id2label`` of ``config.json``, or ``LABEL_<index>``."""
    names = config.get("id2label") or {}
    return str(names.get(str(index), names.get(index, f"LABEL_{index}")))


def class_activation(config: Mapping[str, Any], n_labels: int) -> Activation:
    """Sigmoid for multi-label models and for a single label, else softmax, as Transformers' pipeline has it."""
    multi = config.get("problem_type") == "multi_label_classification"
    return "sigmoid" if multi or n_labels == 1 else "softmax"


def read(model: Model) -> TextFolder:
    """Read the files around ``model``. Raises :class:`~storage.errors.InvalidModel` for damaged or unsupported ones."""
    assert model.path is not None
    root = model.path if model.path.is_dir() else model.path.parent
    if model.path.is_file() and root.name == "onnx" and not (root / "tokenizer.json").exists():
        root = root.parent  # exporters put the graph into onnx/, and the rest stays above
    modules = _modules(root)
    weights = root
    pooling: tuple[str, ...] | None = None
    normalize = False
    include_prompt = True
    for kind, folder in modules or ():
        match kind:
            case "Transformer":
                weights = folder
            case "Pooling":
                config = read_json(folder / "config.json")
                pooling = _pooling(config, folder)
                include_prompt = bool(config.get("include_prompt", True))
            case "Normalize":
                normalize = True
            case _:
                raise InvalidModel(
                    f"{root / 'modules.json'} has a module {kind}, which engine 'onnx' does not run; "
                    "it runs Transformer, Pooling and Normalize"
                )
    config = read_json(weights / "config.json") or dict(model.config)
    sentence = read_json(weights / "sentence_bert_config.json")
    tokenizer_config = read_json(weights / "tokenizer_config.json")
    tokenizer = weights / "tokenizer.json"
    return TextFolder(
        root=root,
        weights=weights,
        config=config,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        convertible_tokenizer=any((weights / name).is_file() for name in _TOKENIZER_SOURCES),
        max_length=_max_length(config, sentence, tokenizer_config),
        lower_case=bool(sentence.get("do_lower_case", False)),
        pooling=pooling,
        normalize=normalize,
        prompt=_prompt(root, include_prompt) if modules is not None else "",
        sentence_transformer=modules is not None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file. Raises :class:`~storage.errors.InvalidModel`."""
    try:
        value = json_text.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} holds no JSON object")
    return value


def _modules(root: Path) -> list[tuple[str, Path]] | None:
    path = root / "modules.json"
    try:
        entries = json_text.loads(path.read_bytes())
        modules = []
        for entry in sorted(entries, key=lambda item: int(item["idx"])):
            folder = root / entry["path"]
            if not folder.resolve().is_relative_to(root.resolve()):
                raise InvalidModel(f"{path} names {entry['path']!r}, which lies outside the model directory")
            modules.append((str(entry["type"]).rsplit(".", 1)[-1], folder))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidModel(f"{path} cannot be read: {error!r}") from error
    return modules


def _pooling(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for key, name in _LEGACY_POOLING.items() if config.get(key)] or ["mean"]
    names = tuple(_POOLING_NAMES.get(mode, mode) for mode in ([modes] if isinstance(modes, str) else modes))
    if unknown := [name for name in names if name not in _POOLINGS]:
        raise InvalidModel(f"{folder / 'config.json'} asks for the unknown pooling {', '.join(map(str, unknown))}")
    return names


def _max_length(config: Mapping[str, Any], *others: Mapping[str, Any]) -> int | None:
    limits = []
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions > 0:
        offset = int(config.get("pad_token_id") or 0) + 1 if config.get("model_type") in _OFFSET_POSITIONS else 0
        limits.append(positions - offset)
    for other in others:
        for key in ("max_seq_length", "model_max_length"):
            limit = other.get(key)
            # Tokenizers without a limit carry 1e30.
            if isinstance(limit, int | float) and 0 < limit < 1e9:
                limits.append(int(limit))
    return min(limits, default=None)


def _prompt(root: Path, include_prompt: bool) -> str:
    config = read_json(root / "config_sentence_transformers.json")
    name = config.get("default_prompt_name")
    prompt = str((config.get("prompts") or {}).get(name, "")) if name else ""
    if prompt and not include_prompt:
        raise InvalidModel(
            f"{root} puts the prompt {prompt!r} before every text and leaves it out of the pooling, "
            "which engine 'onnx' does not do"
        )
    return prompt
