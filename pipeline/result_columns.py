"""The result columns that are known without a model: the output contract's, by task. Pure."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.job_spec import JobSpec, Task


def known_fields(spec: JobSpec) -> list[pa.Field[Any]]:
    """Name and type of the results of generate, chat, classify and score, prefixed; none for the other tasks.

    An embedding's length and a graph's outputs are the model's to say.
    """
    fields: list[tuple[str, pa.DataType]] = []
    if spec.task in (Task.GENERATE, Task.CHAT):
        several = spec.sampling.get("n", 1) != 1
        fields.append(("outputs", pa.list_(pa.string())) if several else ("output", pa.string()))
        fields.append(("finish_reason", pa.string()))
        fields += [(name, pa.int32()) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")]
    elif spec.task is Task.CLASSIFY:
        pair = pa.struct([("label", pa.string()), ("score", pa.float32())])
        fields = [("label", pa.string()), ("score", pa.float32()), ("scores", pa.list_(pair))]
    elif spec.task is Task.SCORE:
        fields = [("score", pa.float32())]
    return [pa.field(spec.output_prefix + name, kind) for name, kind in fields]


def known_names(spec: JobSpec) -> tuple[str, ...]:
    """The names of all result columns, prefixed; none for ``tensor``, whose engine checks its graph's own."""
    if spec.task is Task.EMBED:
        return tuple(spec.output_prefix + name for name in ("embedding", "prompt_tokens"))
    return tuple(field.name for field in known_fields(spec))
