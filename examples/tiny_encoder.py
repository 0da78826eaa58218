"""Small encoders with random weights and a WordPiece tokenizer, made in seconds: for the demo and the tests.

They compute nothing of use; they have the files, the graph and the arithmetic of a real BERT. Deterministic: the same
call writes the same weights.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = ("negative", "neutral", "positive")
WIDTH = 32
MAX_LENGTH = 64

_WORDS = """the a of to and in is it for on with as at by from this that not no yes good bad fine great small large old
new red green blue river mountain city road house tree water fire light dark day night morning evening summer winter
cat dog bird fish horse man woman child people work play read write run walk sleep eat drink make take give see hear
one two three four five six seven eight nine ten first last more less very too also only how why when where who what"""
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def vocabulary() -> list[str]:
    """Special tokens, words, and every letter, digit and mark alone and as a continuation: no text is unknown."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-"
    return [*_SPECIAL, *_WORDS.split(), *(c for c in characters if c != "a"), *(f"##{c}" for c in characters)]


def build_encoder(path: Path | str, *, pooling: str | None = None, normalize: bool = False, seed: int = 0) -> Path:
    """Write a BERT encoder, width 32, two layers, to the directory ``path``, which is returned.

    With ``pooling`` (``mean``, ``cls``, ``lasttoken``), it is a sentence-transformers directory.
    """
    import torch

    path = Path(path)
    torch.manual_seed(seed)
    _spread(_transformers().BertModel(_config())).save_pretrained(path)
    _tokenizer(path)
    if pooling is not None:
        _sentence_transformer(path, pooling, normalize)
    return path


def build_classifier(
    path: Path | str, *, labels: Sequence[str] = LABELS, problem_type: str | None = None, seed: int = 0
) -> Path:
    """Write a BERT sequence classifier to the directory ``path``, which is returned.

    One label makes it a cross-encoder, which scores a text or a pair of texts.
    """
    import torch

    path = Path(path)
    torch.manual_seed(seed)
    config = _config(
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        num_labels=len(labels),
        problem_type=problem_type,
    )
    _spread(_transformers().BertForSequenceClassification(config)).save_pretrained(path)
    _tokenizer(path)
    return path


def _transformers() -> Any:
    # Imported by name: its classes carry no types.
    return importlib.import_module("transformers")


def _config(**more: Any) -> Any:
    return _transformers().BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=MAX_LENGTH,
        **more,
    )


def _spread(model: Any) -> Any:
    """Larger weights than BERT's start: so that different texts differ visibly in the result."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "LayerNorm" not in name and weight.dim() > 1:
                weight.mul_(10)
    return model


def _tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokens = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tokens["[CLS]"]), ("[SEP]", tokens["[SEP]"])],
    )
    tokenizer.save(str(path / "tokenizer.json"))
    _write(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "BertTokenizer",
            "model_max_length": MAX_LENGTH,
            "do_lower_case": True,
            **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
        },
    )


def _sentence_transformer(path: Path, pooling: str, normalize: bool) -> None:
    base = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    entries = [
        {"idx": i, "name": str(i), "path": where, "type": f"{base}.{kind}"} for i, (where, kind) in enumerate(modules)
    ]
    _write(path / "modules.json", entries)
    _write(path / "sentence_bert_config.json", {"max_seq_length": MAX_LENGTH, "do_lower_case": False})
    (path / "1_Pooling").mkdir(exist_ok=True)
    names = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken", "max": "max_tokens"}
    modes = {f"pooling_mode_{name}": mode == pooling for mode, name in names.items()}
    _write(path / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH, **modes})


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
