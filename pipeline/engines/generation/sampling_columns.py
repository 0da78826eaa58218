"""Sampling parameters of a row's own, from its columns: which there may be, and what each column must hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from pipeline.engines.arrow_text import column_type, is_list, is_text
from pipeline.engines.generation import structured_output
from pipeline.engines.generation.sampling import SAMPLING, TABLE, check_parameter
from pipeline.engines.generation.validators import unknown_name
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidInput, InvalidJob, RowError

STRUCTURED = "structured_outputs"

_Kind = tuple[str, Callable[[pa.DataType], bool]]


def _is_list(kind: Any, of: Callable[[pa.DataType], bool]) -> bool:
    return is_list(kind) and of(kind.value_type)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


_TEXTS: _Kind = ("text, or lists of it", lambda kind: is_text(kind) or _is_list(kind, is_text))
_TOKENS: _Kind = ("lists of token ids", lambda kind: _is_list(kind, pa.types.is_integer))
_KINDS: Mapping[str, _Kind] = {
    "integer": ("whole numbers", _is_number),
    "number": ("numbers", _is_number),
    "flag": ("true and false", pa.types.is_boolean),
    "text": ("text", is_text),
    "schema": ("text", is_text),
    "texts": _TEXTS,
    "text_or_texts": _TEXTS,
    "token_ids": _TOKENS,
    "some_token_ids": _TOKENS,
}
"""What a column must hold, by the type of the parameter."""
COLUMNS: Mapping[str, str] = {
    prefix + name: table.entries[name]["type"]
    for prefix, table in (("", TABLE), (f"{STRUCTURED}.", structured_output.TABLE))
    for name in table.having("column")
}
"""Parameter → its type. ``structured_outputs.json`` is a column of JSON Schemas, as text."""


def check_columns(spec: JobSpec, schema: pa.Schema) -> tuple[str, ...]:
    """The columns that sampling parameters come from.

    Raises :class:`InvalidJob` for a parameter that cannot come from a column, and :class:`InvalidInput` for a column
    that is not there or holds something else.
    """
    for name, column in spec.sampling_columns.items():
        field = f"sampling_columns.{name}"
        if name not in COLUMNS:
            whole = name.partition(".")[0]
            if whole == STRUCTURED:
                why = f"name one of {', '.join(item for item in COLUMNS if item.startswith(STRUCTURED))}"
            elif name in SAMPLING:
                why = "it is the same for every row of a job: set it in sampling"
            else:
                why = unknown_name("sampling parameters", name, COLUMNS)
            raise InvalidJob(why, field=field)
        kind = column_type(schema, column, field)
        words, fits = _KINDS[COLUMNS[name]]
        if not fits(kind):
            raise InvalidInput(f"column {column!r} is {kind}; {name} needs {words}", field=field)
    kinds = [name for name in spec.sampling_columns if name.startswith(STRUCTURED)]
    if len(kinds) > 1:
        raise InvalidJob(f"{' and '.join(kinds)} exclude each other", field="sampling_columns")
    return tuple(spec.sampling_columns.values())


def sampling_of(spec: JobSpec, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sampling parameters of one row, or ``None`` where they are the job's.

    ``row``: a value for every column of ``sampling_columns``. Raises :class:`RowError`, naming the column.
    """
    own: dict[str, Any] = {}
    for name, column in spec.sampling_columns.items():
        value = row[column]
        if value is None:
            continue
        if isinstance(value, bytes):
            raise RowError(RowErrorCode.INVALID_UTF8, f"column {column!r} holds bytes that are not UTF-8")
        parameter, value = _parameter(spec, name, value)
        try:
            check_parameter(parameter, value)
        except InvalidJob as error:
            raise RowError(RowErrorCode.INVALID_VALUE, f"column {column!r}: {error}") from None
        own[parameter] = value
    # Whether they go together is said by vLLM, which gets them next.
    return {**spec.sampling, **own} if own else None


def _parameter(spec: JobSpec, name: str, value: Any) -> tuple[str, Any]:
    """The sampling parameter, and its value as vLLM has it."""
    if COLUMNS[name] == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with nulls in it, as pandas writes one
    kind = name.removeprefix(f"{STRUCTURED}.")
    if kind == name:
        return name, value
    # The manner is the job's, the constraint the row's.
    manners = {k: v for k, v in (spec.sampling.get(STRUCTURED) or {}).items() if k not in structured_output.KINDS}
    return STRUCTURED, manners | {kind: [value] if kind == "choice" and isinstance(value, str) else value}


def key_of(sampling: Mapping[str, Any]) -> str:
    """The same text for the same parameters. The order inside counts: a JSON Schema's properties are answered in it."""
    return json.dumps(dict(sorted(sampling.items())))
