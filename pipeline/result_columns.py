"""The result columns that are known without a model: the output contract's, by task. Pure."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.engines.answer_fields import fields_of
from pipeline.job_spec import JobSpec, Task


def known_fields(spec: JobSpec) -> list[pa.Field[Any]]:
    """Name and type of the results of generate, chat, classify and score, prefixed; none for the other tasks.

    An embedding's length and a graph's outputs are the model's to say.
    """
    return [field.with_name(spec.output_prefix + field.name) for field in fields_of(spec)]


def known_names(spec: JobSpec) -> tuple[str, ...]:
    """The names of all result columns, prefixed; none for ``tensor``, whose engine checks its graph's own."""
    if spec.task is Task.EMBED:
        return tuple(spec.output_prefix + name for name in ("embedding", "prompt_tokens"))
    return tuple(field.name for field in known_fields(spec))
