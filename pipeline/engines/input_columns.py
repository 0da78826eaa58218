"""The columns that a job of texts reads, and what they must hold: one rule for every engine that takes such jobs."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.engines import rendering
from pipeline.engines.arrow_text import column_type, is_list, is_text
from pipeline.engines.generation import chat_messages, sampling_columns
from pipeline.engines.media import columns as media_columns
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.prompt_template import Template
from storage.errors import InvalidInput


def templates(spec: JobSpec) -> list[tuple[str, Template]]:
    """The templates that the job reads columns through, each with the name of its field."""
    if spec.messages is not None:
        return [(f"messages.{index}.content", Template(m.content)) for index, m in enumerate(spec.messages)]
    return [("prompt", Template(spec.prompt))] if spec.prompt is not None else []


def check_generation(spec: JobSpec, schema: pa.Schema) -> tuple[str, ...]:
    """The columns that a job of generate or chat reads. Raises :class:`InvalidInput` where one is missing or holds the
    wrong type, and :class:`~storage.errors.InvalidJob` for a sampling parameter that no column can give."""
    columns: list[str] = []
    for field, template in templates(spec):
        for name in template.fields:
            kind = column_type(schema, name, field)
            if (why := rendering.refusal(kind)) is not None:
                raise InvalidInput(f"column {name!r} is {kind}, which a template cannot write: {why}", field=field)
            columns.append(name)
    for field, fits, wanted in (
        ("column", chat_messages.is_conversation, chat_messages.WANTED),
        ("prompt_token_column", _is_token_list, "token ids are a list of whole numbers"),
        ("adapter_column", is_text, "names of adapters are text"),
    ):
        if (name := getattr(spec, field)) is not None:
            if not fits(kind := column_type(schema, name, field)):
                raise InvalidInput(f"column {name!r} is {kind}; {wanted}", field=field)
            columns.append(name)
    for modality, name in media_columns.columns_of(spec).items():
        kind = column_type(schema, name, media_columns.FIELDS[modality])
        media_columns.check_column(spec, modality, kind, name)
        columns.append(name)
    return tuple(dict.fromkeys([*columns, *sampling_columns.check_columns(spec, schema)]))


def check_texts(spec: JobSpec, schema: pa.Schema) -> tuple[str, ...]:
    """The columns that a job of embed, classify or score reads. Raises :class:`InvalidInput` where one is missing or
    holds no text."""
    columns = {field: name for field in ("column", "pair_column") if (name := getattr(spec, field)) is not None}
    for field, name in columns.items():
        if not is_text(kind := column_type(schema, name, field)):
            raise InvalidInput(f"column {name!r} is {kind}; task '{spec.task}' needs text", field=field)
    return tuple(dict.fromkeys(columns.values()))


def _is_token_list(kind: Any) -> bool:
    return is_list(kind) and pa.types.is_integer(kind.value_type)
