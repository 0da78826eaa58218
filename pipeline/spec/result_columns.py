"""Name and type of the result columns of generate, chat, classify and score, and the check that no two columns of an
output have one name.

The columns of embed and tensor are the engine's own (its ``result_schema``): an embedding's length and a graph's
outputs are the model's to say. Here are only the names that embed must give them, and the columns of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidJob

ERROR_COLUMN = "error"
_LEAVE_OUT = "leave them out: name the columns to copy in keep_columns (--keep)"

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


def check_names(
    keep: Sequence[str], results: Iterable[str], prefix: str, notify: Callable[[str], None] = lambda message: None
) -> None:
    """Refuse an output in which two columns have one name. ``keep``: input columns that are copied; ``results``: the
    engine's columns, to which ``prefix`` is added.

    Raises :class:`~storage.errors.InvalidJob` with the names and a way out. ``notify`` hears of names that differ by
    letter case only.
    """
    named = [prefix + name for name in results]
    if ERROR_COLUMN in keep:
        raise InvalidJob(
            f"the input column {ERROR_COLUMN!r} has the name of a result column; {_LEAVE_OUT}", field="keep_columns"
        )
    if clash := [name for name in named if name == ERROR_COLUMN or named.count(name) > 1]:
        raise InvalidJob(
            f"the model has outputs named {_listed(clash)}, which would be two columns of one name; set another "
            "output_prefix (--output-prefix), or rename them in the model",
            field="output_prefix",
        )
    if clash := [name for name in keep if name in named]:
        raise InvalidJob(
            f"the input columns {_listed(clash)} have the names of result columns; set output_prefix "
            f"(--output-prefix), or {_LEAVE_OUT}",
            field="output_prefix",
        )
    ours = {name.casefold() for name in (*named, ERROR_COLUMN)}
    if alike := [name for name in keep if name.casefold() in ours]:
        notify(
            f"the input columns {_listed(alike)} differ from result columns by letter case only; readers that ignore "
            "it, such as DuckDB and Spark, confuse them"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(names)))
