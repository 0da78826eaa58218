"""What the ``fake`` engine reads from a row, and what it answers: everything follows from the row's content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.engines import rendering
from pipeline.engines.generation import chat_messages
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


def is_text(kind: pa.DataType) -> bool:
    """True for strings and bytes: plain, large, view or dictionary-encoded."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
        )
    )


def is_numeric(kind: Any) -> bool:
    """True for numbers and booleans, and for lists and tensors of them."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return is_numeric(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return is_numeric(kind.value_type)
    return any(
        test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    )


def reader(spec: JobSpec) -> Read:
    """How the rows of this job become texts: called with a batch and its number of rows. Not for ``tensor``."""
    if spec.prompt is not None:
        return _rendered(Template(spec.prompt).fields, Template(spec.prompt).render)
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
    for at, text in enumerate(found):
        if isinstance(text, RowError):
            failures.setdefault(at, (text.code, text.message))
    return [text if isinstance(text, str) else None for text in found]


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
    return _texts(column, name, failures) if is_text(kind) else column.to_pylist()


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


def answer_to(prompt: str) -> str:
    """The whole answer to a prompt: a hash of it, then its beginning."""
    return f"fake:{hashlib.sha256(prompt.encode()).hexdigest()[:8]} {prompt[:PROMPT_CHARACTERS]}"


def answers(spec: JobSpec, prompts: Sequence[str]) -> dict[str, pa.Array[Any]]:
    """The result columns of generate and chat: a hash of the prompt, then its beginning."""
    n_answers, most = spec.sampling.get("n", 1), spec.sampling.get("max_tokens")
    outputs = [answer_to(prompt) for prompt in prompts]
    counts = [len(output.split()) for output in outputs]
    reasons = ["stop"] * len(prompts)
    if most is not None and max(counts, default=0) > most:
        for at, count in enumerate(counts):
            if count > most:
                outputs[at] = " ".join(outputs[at].split()[:most])
                counts[at], reasons[at] = most, "length"
    columns: dict[str, pa.Array[Any]] = {}
    if n_answers == 1:
        columns["output"] = pa.array(outputs, pa.string())
    else:
        many = [[output.replace("fake:", f"fake:{i}:", 1) for i in range(n_answers)] for output in outputs]
        columns["outputs"] = pa.array(many, pa.list_(pa.string()))
        counts = [count * n_answers for count in counts]
    columns["finish_reason"] = pa.array(reasons, pa.string())
    columns["prompt_tokens"] = _words(prompts)
    columns["cached_tokens"] = pa.array(np.zeros(len(prompts), np.int32))
    columns["completion_tokens"] = pa.array(counts, pa.int32())
    return columns


def embeddings(texts: Sequence[str]) -> dict[str, pa.Array[Any]]:
    """Unit vectors of ``WIDTH`` elements."""
    vectors = _numbers(texts, WIDTH) - 0.5
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    flat = pa.array(vectors.astype(np.float32).reshape(-1))
    return {"embedding": pa.FixedSizeListArray.from_arrays(flat, WIDTH), "prompt_tokens": _words(texts)}


def classes(texts: Sequence[str]) -> dict[str, pa.Array[Any]]:
    """The best of ``LABELS``, and the probability of each."""
    p = _numbers(texts, len(LABELS)) + 1e-3
    p = (p / p.sum(axis=1, keepdims=True)).astype(np.float32)
    order = np.argsort(-p, axis=1, kind="stable")
    best = order[:, 0]
    labels = pa.array(LABELS, pa.string())
    pairs = pa.StructArray.from_arrays(
        [labels.take(pa.array(order.reshape(-1), pa.int64())), pa.array(np.take_along_axis(p, order, 1).reshape(-1))],
        ["label", "score"],
    )
    offsets = pa.array(np.arange(len(p) + 1) * len(LABELS), pa.int32())
    return {
        "label": labels.take(pa.array(best, pa.int64())),
        "score": pa.array(p[np.arange(len(p)), best]),
        "scores": pa.ListArray.from_arrays(offsets, pairs),
    }


def scores(texts: Sequence[str]) -> dict[str, pa.Array[Any]]:
    """One number from 0 to 1."""
    return {"score": pa.array(_numbers(texts, 1)[:, 0].astype(np.float32))}


def _numbers(texts: Sequence[str], width: int) -> npt.NDArray[np.float64]:
    """float64 [n, width], evenly spread over 0 to 1, by the texts' hashes."""
    hashes = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
    return np.frombuffer(hashes, ">u4").reshape(len(texts), 8)[:, :width] / float(2**32 - 1)


def _words(texts: Sequence[str]) -> Any:
    return pa.array([len(text.split()) for text in texts], pa.int32())
