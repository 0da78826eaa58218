"""What the files beside a text model say about it: tokenizer, length limit, pooling, normalization, labels, prompt.

Reads JSON only, so it is cheap enough for ``check``. Formats: a Transformers directory, a sentence-transformers
directory (:mod:`~pipeline.engines.model_config.sentence_modules`), and a ``.onnx`` file with ``tokenizer.json``
beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.engines.model_config import sentence_modules, sentence_prompts
from pipeline.engines.model_config.json_files import read_json
from pipeline.engines.model_config.sentence_layers import Layer, Normalize
from pipeline.engines.model_config.sentence_prompts import NONE, Prompts
from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidModel

Activation = Literal["sigmoid", "softmax", "identity"]

_TOKENIZER_SOURCES = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
# Position ids of these start after the padding index, so two of the positions in the table are never used for text.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "luke")


@dataclass(frozen=True, slots=True)
class TextFolder:
    """``root`` is the model directory, ``weights`` the directory with ``config.json`` (below it in some old models).

    Of sentence-transformers: ``pooling``, ``layers`` and ``normalize`` are applied to token states in this order;
    ``include_prompt``: whether pooling sees the prompt; ``truncate_dim``: how many numbers of a vector are kept.
    """

    root: Path
    weights: Path
    config: Mapping[str, Any]
    tokenizer: Path | None
    convertible_tokenizer: bool
    max_length: int | None
    lower_case: bool
    pooling: tuple[str, ...] | None
    normalize: bool
    sentence_transformer: bool
    layers: tuple[Layer, ...] = ()
    include_prompt: bool = True
    truncate_dim: int | None = None
    prompts: Prompts = NONE

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

    @property
    def module_width(self) -> int | None:
        """How many numbers the last layer with weights gives; ``None`` without one."""
        return next((layer.n_out for layer in reversed(self.layers) if not isinstance(layer, Normalize)), None)

    def unit_length(self, spec: JobSpec) -> bool:
        """Whether the job's vectors have unit length: as it says, else as the model's own files say."""
        if spec.normalize is not None:
            return spec.normalize
        return self.normalize and (self.truncate_dim is None or spec.dimensions is not None)

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
    modules = sentence_modules.read(root)
    weights = root if modules is None else modules.weights
    config = read_json(weights / "config.json") or dict(model.config)
    tokenizer_config = read_json(weights / "tokenizer_config.json")
    tokenizer = weights / "tokenizer.json"
    settings = sentence_modules.settings(weights) if modules is None else modules.settings
    shared: dict[str, Any] = {
        "root": root,
        "weights": weights,
        "config": config,
        "tokenizer": tokenizer if tokenizer.is_file() else None,
        "convertible_tokenizer": any((weights / name).is_file() for name in _TOKENIZER_SOURCES),
        "lower_case": bool(settings.get("do_lower_case", False)),
    }
    if modules is None:
        limit = _max_length(config, settings, tokenizer_config)
        return TextFolder(**shared, max_length=limit, pooling=None, normalize=False, sentence_transformer=False)
    # sentence-transformers sets the tokenizer's limit to its own, where it has one.
    own = None if modules.max_length is None else {"model_max_length": modules.max_length}
    return TextFolder(
        **shared,
        max_length=_max_length(config, own or tokenizer_config),
        pooling=modules.pooling,
        normalize=modules.normalize,
        sentence_transformer=True,
        layers=modules.layers,
        include_prompt=modules.include_prompt,
        truncate_dim=_truncate_dim(root),
        prompts=sentence_prompts.read(root),
    )


def _truncate_dim(root: Path) -> int | None:
    path = root / "config_sentence_transformers.json"
    size = read_json(path).get("truncate_dim")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise InvalidModel(f"{path} is damaged: truncate_dim is {size!r}")
    return size


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
