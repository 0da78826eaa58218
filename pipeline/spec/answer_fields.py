"""Name and type of each task's result columns, for engines and for planning. An engine may add its own (``tensor``)."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.spec.job_spec import JobSpec, Task

JSON = pa.json_(pa.string())
"""JSON text, in a column that says so."""
COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")

LIKELY = pa.struct(
    [pa.field("token_id", pa.int32()), pa.field("token", pa.string()), pa.field("logprob", pa.float32())]
)
"""One token that could have come, with the natural logarithm of its probability."""
LOGPROBS = pa.list_(pa.struct([*LIKELY, pa.field("top_logprobs", pa.list_(LIKELY))]))
"""For every token the one that came, and the likeliest ones, likeliest first (``top_logprobs``)."""
SCORES = pa.list_(pa.struct([pa.field("label", pa.string()), pa.field("score", pa.float32())]))


def fields_of(spec: JobSpec) -> list[pa.Field[Any]]:
    """Name and type of the results of generate, chat, classify and score; none for the other tasks.

    With ``n`` above 1, ``outputs`` holds all answers in place of ``output``, ``completion_tokens`` counts all of them,
    ``finish_reason`` is ``length`` when any was cut off, and ``logprobs`` has a list for each. A token of the prompt
    that nothing comes before has no probability: the first of ``prompt_logprobs`` is null.

    Where rows are requests, ``response`` holds the body of each response, and the other columns what it says first;
    ``embedding`` that of a request with one input, null for those with several.
    """
    if spec.request_column is not None:
        return [pa.field(name, kind) for name, kind in _of_requests(spec)]
    fields: list[tuple[str, pa.DataType]] = []
    if spec.task in (Task.GENERATE, Task.CHAT):
        several = spec.sampling.get("n", 1) != 1
        fields.append(("outputs", pa.list_(pa.string())) if several else ("output", pa.string()))
        fields.append(("finish_reason", pa.string()))
        fields += [(name, pa.int32()) for name in COUNTS]
        if wants_logprobs(spec):
            fields.append(("logprobs", pa.list_(LOGPROBS) if several else LOGPROBS))
        if spec.sampling.get("prompt_logprobs") is not None:
            fields.append(("prompt_logprobs", LOGPROBS))
    elif spec.task is Task.CLASSIFY:
        fields = [("label", pa.string()), ("score", pa.float32()), ("scores", SCORES)]
    elif spec.task is Task.SCORE:
        fields = [("score", pa.float32())]
    return [pa.field(name, kind) for name, kind in fields]


def _of_requests(spec: JobSpec) -> list[tuple[str, Any]]:
    if spec.task is Task.EMBED:
        return [("embedding", pa.list_(pa.float32())), ("prompt_tokens", pa.int32()), ("response", JSON)]
    counts = [(name, pa.int32()) for name in COUNTS]
    return [("output", pa.string()), ("finish_reason", pa.string()), *counts, ("response", JSON)]


def names_of(spec: JobSpec) -> tuple[str, ...] | None:
    """The names of a text task's result columns; ``None`` for ``tensor``, whose graph has its own."""
    if spec.task is Task.TENSOR:
        return None
    if spec.task is Task.EMBED and spec.request_column is None:
        return ("embedding", "prompt_tokens")
    return tuple(field.name for field in fields_of(spec))


def wants_logprobs(spec: JobSpec) -> bool:
    """Whether the job asks for the probabilities of the answer's tokens."""
    return spec.sampling.get("logprobs") is not None or bool(spec.sampling.get("logprob_token_ids"))
