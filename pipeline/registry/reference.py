"""The original pipeline of a checkpoint, from raw texts to final results, in PyTorch: what a graph has to agree with.

Embeddings are ``SentenceTransformer.encode``'s, classes the text classification pipeline's of Transformers, scores
``CrossEncoder.predict``'s.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.models.model import Model
from storage.errors import EngineMissing, InvalidModel

Numbers = npt.NDArray[np.float64]
TASKS = ("embed", "classify", "score")
_BATCH = 16


@dataclass(frozen=True, slots=True)
class Reference:
    """Results of every text: numbers, [rows, width], in float64 and in float32, and the columns' names of classes."""

    exact: Numbers
    single: Numbers
    labels: tuple[str, ...] = ()


def run(
    model: Model,
    task: str,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    prompt_name: str | None = None,
    prefix: str | None = None,
) -> Reference:
    """Run the checkpoint over the texts, in float64 and in float32.

    Raises :class:`EngineMissing` without the packages of the extra ``export``, :class:`InvalidModel` for a checkpoint
    that they do not load.
    """
    try:
        torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        sentence_transformers = importlib.import_module("sentence_transformers")
    except ImportError as error:
        what = "the original pipeline needs PyTorch, Transformers and sentence-transformers: install 'rowmill[export]'"
        raise EngineMissing(f"{what}, or give --against") from error
    path = str(model.path)
    try:
        with torch.inference_mode():
            if task == "embed":
                encoder = sentence_transformers.SentenceTransformer(path, device="cpu")
                prompt = {"prompt_name": prompt_name} if prefix is None else {"prompt": prefix}
                found = [_encoded(encoder.to(kind), texts, prompt) for kind in (torch.float32, torch.float64)]
                return Reference(found[1], found[0])
            if task == "score":
                scorer = sentence_transformers.CrossEncoder(path, device="cpu")
                rows = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
                found = [_scored(scorer, kind, rows) for kind in (torch.float32, torch.float64)]
                return Reference(found[1], found[0])
            return _classified(torch, transformers, path, texts, pairs)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModel(f"{path} does not run in PyTorch: {type(error).__name__}: {error}", field="model") from error


def _encoded(encoder: Any, texts: Sequence[str], prompt: dict[str, Any]) -> Numbers:
    given = {name: value for name, value in prompt.items() if value is not None}
    return np.asarray(encoder.encode(list(texts), batch_size=_BATCH, show_progress_bar=False, **given), np.float64)


def _scored(scorer: Any, kind: Any, rows: Sequence[Any]) -> Numbers:
    scorer.model.to(kind)
    found = np.asarray(scorer.predict(rows, batch_size=_BATCH, show_progress_bar=False), np.float64)
    return found.reshape(len(rows), -1)


def _classified(
    torch: Any, transformers: Any, path: str, texts: Sequence[str], pairs: Sequence[str] | None
) -> Reference:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    found, labels = [], tuple(str(model.config.id2label[n]) for n in range(model.config.num_labels))
    for kind in (torch.float32, torch.float64):
        classify = transformers.pipeline("text-classification", model=model.to(kind), tokenizer=tokenizer, device="cpu")
        rows = (
            [{"text": text, "text_pair": pair} for text, pair in zip(texts, pairs, strict=True)]
            if pairs
            else list(texts)
        )
        results = [classify(row, top_k=None, truncation=True) for row in rows]
        by_name = [{item["label"]: item["score"] for item in result} for result in results]
        found.append(np.array([[row[label] for label in labels] for row in by_name], np.float64))
    return Reference(found[1], found[0], labels)
