"""What the ``fake`` engine reads from a row, and what it answers: everything follows from the row's content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.engines import arrow_text, pooled_results, rendering
from pipeline.engines.generation import chat_messages
from pipeline.engines.pooling import unit_length
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec, Task
from pipeline.spec.prompt_template import Template
from storage.errors import RowError

WIDTH = 8
"""Elements of an embedding."""
LABELS = ("negative", "neutral", "positive")
PROMPT_CHARACTERS = 64
"""How much of the prompt an answer repeats."""

Failure = tuple[str, str]
"""A ``RowErrorCode`` and a message."""
Texts = tuple[list[str | None], dict[int, Failure]]
"""One text per row, ``None`` for a row in the failures (position → code, message)."""
Read = Callable[[pa.RecordBatch, int], Texts]
Column = Any
"""An Arrow array of any type; the stubs know a list's members only after a cast to its class."""


def is_numeric(kind: Any) -> bool:
    """True for numbers and booleans, and for lists and tensors of them."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return is_numeric(kind.value_type)
    if arrow_text.is_list(kind):
        return is_numeric(kind.value_type)
    return any(
        test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    )


def reader(spec: JobSpec) -> Read:
    """How the rows of this job become texts: called with a batch and its number of rows. Not for ``tensor``."""
    if spec.prompt is not None:
        template = Template(spec.prompt)
        return _rendered(template.fields, None if template.is_one_field else template.render)
    if spec.messages is not None:
        turns = [(message.role, Template(message.content)) for message in spec.messages]
        fields = tuple(dict.fromkeys(name for _, template in turns for name in template.fields))

        def render(row: Mapping[str, str]) -> str:
            contents = [template.render(row) for _, template in turns]
            if not any(contents):
                return ""
            return "\n".join(f"{role}: {content}" for (role, _), content in zip(turns, contents, strict=True))

        return _rendered(fields, render)
    if spec.prompt_token_column is not None:
        column = spec.prompt_token_column
        return _tokens(column)
    assert spec.column is not None
    if spec.task is Task.CHAT:
        return _conversations(spec.column)
    if spec.pair_column is None:
        return _rendered((spec.column,), None)
    return _rendered((spec.column, spec.pair_column), lambda row: "\n".join(map(str, row.values())))


def _rendered(names: tuple[str, ...], render: Callable[[Mapping[str, str]], str] | None) -> Read:
    def read(batch: pa.RecordBatch, n: int) -> Texts:
        failures: dict[int, Failure] = {}
        columns = [_texts(batch.column(name), name, failures) for name in names]
        if render is None:
            return columns[0], failures
        rows = zip(*columns, strict=True) if columns else iter([()] * n)
        if failures:
            return [
                None if at in failures else render(dict(zip(names, row, strict=True))) for at, row in enumerate(rows)
            ], failures
        return [render(dict(zip(names, row, strict=False))) for row in rows], failures

    return read


def _texts(column: Column, name: str, failures: dict[int, Failure]) -> list[str | None]:
    found = rendering.texts(column, name)
    errors = {at: text for at, text in enumerate(found) if isinstance(text, RowError)}
    for at, error in errors.items():
        failures.setdefault(at, (error.code, error.message))
    return [text if isinstance(text, str) else None for text in found] if errors else cast(list[str | None], found)


def _tokens(name: str) -> Read:
    def read(batch: pa.RecordBatch, n: int) -> Texts:
        failures: dict[int, Failure] = {}
        tokens = _values(batch.column(name), name, failures)
        return [None if row is None else " ".join(map(str, row)) for row in tokens], failures

    return read


def _values(column: Column, name: str, failures: dict[int, Failure]) -> list[Any]:
    """Messages or tokens, as text or lists; a failure for a row that is null."""
    if column.null_count:
        for at in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
            failures.setdefault(at, (RowErrorCode.MISSING_VALUE, f"column {name!r} is null"))
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    if pa.types.is_null(kind):
        return [None] * len(column)
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _texts(column, name, failures) if arrow_text.is_text(held) else column.to_pylist()


def _conversations(name: str) -> Read:
    def read(batch: pa.RecordBatch, n: int) -> Texts:
        failures: dict[int, Failure] = {}
        texts: list[str | None] = []
        for at, value in enumerate(_values(batch.column(name), name, failures)):
            if at in failures:
                texts.append(None)
                continue
            try:
                texts.append(conversation(value))
            except RowError as error:
                texts.append(None)
                failures[at] = (error.code, f"column {name!r}: {error.message}")
        return texts, failures

    return read


def conversation(messages: Any) -> str:
    """The text of a conversation, a line for each message. Raises :class:`RowError`."""
    parsed = chat_messages.parse_messages(messages)
    text = "\n".join(f"{message['role']}: {chat_messages.text_of(message)}" for message in parsed)
    try:
        text.encode()  # JSON can hold half of a surrogate pair
    except UnicodeEncodeError as error:
        raise RowError(RowErrorCode.INVALID_UTF8, f"the text is not valid Unicode: {error.reason}") from None
    return text


def row_sums(column: Column) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Per row the sum of its numbers, float64 [n], and whether one of them (or the row) is null, bool [n]."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    n, kind = len(column), column.type
    nulls = column.is_null().to_numpy(zero_copy_only=False)
    if not hasattr(kind, "value_type"):
        numbers: Column = column.cast(pa.float64(), safe=False).fill_null(0.0)
        return numbers.to_numpy(zero_copy_only=False), nulls
    # Without its null rows, below which lists of a fixed size keep elements that only some functions skip.
    present, column = np.flatnonzero(~nulls), column.drop_null()
    indices: Column = pc.list_parent_indices(column)
    parents = present[indices.to_numpy(zero_copy_only=False)]
    inner, inner_nulls = row_sums(column.flatten())
    sums = np.bincount(parents, weights=inner, minlength=n).astype(np.float64)
    return sums, nulls | (np.bincount(parents, weights=inner_nulls, minlength=n) > 0)


def answer_to(prompt: str, n: int, most: int | None, stops: Sequence[str] = ()) -> tuple[list[str], str]:
    """``n`` answers to a prompt, a hash of it and then its beginning, of ``most`` words; and why they end."""
    text, reason = f"fake:{hashlib.sha256(prompt.encode()).hexdigest()[:8]} {prompt[:PROMPT_CHARACTERS]}", "stop"
    if most is not None and len(words := text.split()) > most:
        text, reason = " ".join(words[:most]), "length"
    if stops and (ends := [end for stop in stops if (end := text.find(stop)) >= 0]):
        text, reason = text[: min(ends)], "stop"
    return [text] if n == 1 else [text.replace("fake:", f"fake:{i}:", 1) for i in range(n)], reason


def answer_columns(
    made: Sequence[tuple[list[str], str]], prompts: Sequence[str], names: Collection[str]
) -> dict[str, Any]:
    """The values of the result columns ``names``, of those that generate and chat may have."""
    columns: dict[str, Callable[[], Any]] = {
        "output": lambda: [outputs[0] for outputs, _ in made],
        "outputs": lambda: [outputs for outputs, _ in made],
        "finish_reason": lambda: [reason for _, reason in made],
        "finish_reasons": lambda: [[reason] * len(outputs) for outputs, reason in made],
        "prompt_tokens": lambda: word_counts(prompts),
        "cached_tokens": lambda: np.zeros(len(made), np.int32),
        "completion_tokens": lambda: [len(outputs) * len(outputs[0].split()) for outputs, _ in made],
        "logprobs": lambda: [None] * len(made),
    }
    return {name: columns[name]() for name in names}


def pooled(spec: JobSpec, texts: Sequence[str]) -> dict[str, Any]:
    """The result columns of embed (unit vectors of ``WIDTH`` numbers), classify and score (numbers from 0 to 1)."""
    if spec.task is Task.EMBED:
        vectors = unit_length(_numbers(texts, WIDTH) - 0.5)
        return {"embedding": pooled_results.embedding_column(vectors), "prompt_tokens": word_counts(texts)}
    if spec.task is Task.SCORE:
        return {"score": _numbers(texts, 1)[:, 0].astype(np.float32)}
    p = _numbers(texts, len(LABELS)) + 1e-3
    p = (p / p.sum(axis=1, keepdims=True)).astype(np.float32)
    return pooled_results.classify_columns(spec, p, pa.array(LABELS, pa.string()))


def _numbers(texts: Sequence[str], width: int) -> Any:
    """float64 [n, width], evenly spread over 0 to 1, by the texts' hashes."""
    hashes = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
    return np.frombuffer(hashes, ">u4").reshape(len(texts), 8)[:, :width] / float(2**32 - 1)


def word_counts(texts: Sequence[str]) -> list[int]:
    """The words of each text, which are its tokens."""
    return [len(text.split()) for text in texts]
