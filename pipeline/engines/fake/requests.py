"""What the ``fake`` engine reads of rows that are requests, and answers: as it answers other rows, row by row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa

from pipeline.engines.fake import rows as fake_rows
from pipeline.engines.generation import request_rows
from pipeline.engines.generation.request_rows import AUTO_TOOLS, Parameters
from storage.errors import RowError

HONOURED = frozenset({"n", "max_tokens", "stop", AUTO_TOOLS}) | {
    # Its answers follow from the prompt alone: nothing is drawn that these could change.
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
}


def texts_of(batch: pa.RecordBatch, n: int) -> fake_rows.Texts:
    """The prompts of requests as texts."""
    texts: list[str | None] = []
    failures: dict[int, fake_rows.Failure] = {}
    for at, encoded in enumerate(_column(batch, request_rows.PROMPT)):
        try:
            prompt = request_rows.prompt_of(encoded)
            if isinstance(prompt, str):
                texts.append(prompt)
            elif isinstance(prompt[0], int):
                texts.append(" ".join(map(str, prompt)))
            else:
                texts.append(fake_rows.conversation(prompt))
        except RowError as error:
            texts.append(None)
            failures[at] = (error.code, error.message)
    return texts, failures


def answers(batch: pa.RecordBatch, at: Sequence[int], prompts: Sequence[str], names: Collection[str]) -> dict[str, Any]:
    """The result columns ``names`` for the rows at these positions, whose prompts are ``prompts``."""
    encoded = _column(batch, request_rows.PARAMETERS)
    return fake_rows.answer_columns(
        [_answer(request_rows.decoded(encoded[row]), text) for row, text in zip(at, prompts, strict=True)],
        prompts,
        names,
    )


def _answer(own: Parameters, prompt: str) -> tuple[list[str], str]:
    stops = own.sampling.get("stop") or ()
    return fake_rows.answer_to(
        prompt, own.n, own.sampling.get("max_tokens"), [stops] if isinstance(stops, str) else stops
    )


def _column(batch: pa.RecordBatch, name: str) -> list[str]:
    found: Any = batch.column(name).to_pylist()
    return list(found)
