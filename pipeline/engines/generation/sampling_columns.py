"""Sampling parameters of a row's own, from its columns: which there may be, and what each column must hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from pipeline.engines.arrow_text import is_text
from pipeline.engines.generation import structured_output
from pipeline.engines.generation.sampling import SAMPLING, check_parameter, check_sampling
from pipeline.engines.generation.validators import unknown_name
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidInput, InvalidJob, RowError

STRUCTURED = "structured_outputs"

_Kind = tuple[str, Callable[[pa.DataType], bool]]


def _is_list(kind: Any, of: Callable[[pa.DataType], bool]) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in lists) and of(kind.value_type)


_WHOLE: _Kind = ("whole numbers", lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind))
_NUMBER: _Kind = ("numbers", _WHOLE[1])
_FLAG: _Kind = ("true and false", pa.types.is_boolean)
_TEXT: _Kind = ("text", is_text)
_TEXTS: _Kind = ("text, or lists of it", lambda kind: is_text(kind) or _is_list(kind, is_text))
_TOKENS: _Kind = ("lists of token ids", lambda kind: _is_list(kind, pa.types.is_integer))

COLUMNS: Mapping[str, _Kind] = MappingProxyType(
    {
        "temperature": _NUMBER,
        "top_p": _NUMBER,
        "min_p": _NUMBER,
        "presence_penalty": _NUMBER,
        "frequency_penalty": _NUMBER,
        "repetition_penalty": _NUMBER,
        "top_k": _WHOLE,
        "seed": _WHOLE,
        "max_tokens": _WHOLE,
        "min_tokens": _WHOLE,
        "thinking_token_budget": _WHOLE,
        "ignore_eos": _FLAG,
        "stop": _TEXTS,
        "bad_words": _TEXTS,
        "stop_token_ids": _TOKENS,
        "allowed_token_ids": _TOKENS,
        **{f"{STRUCTURED}.{name}": _TEXT for name in ("json", "regex", "grammar", "structural_tag")},
        f"{STRUCTURED}.choice": _TEXTS,
    }
)
"""Parameter → what its column must hold. ``structured_outputs.json`` is a column of JSON Schemas, as text."""


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
        if schema.names.count(column) != 1:
            n = schema.names.count(column)
            what = f"{n} columns named" if n else "no column"
            raise InvalidInput(f"the input has {what} {column!r}; it has {', '.join(schema.names)}", field=field)
        kind = schema.field(column).type
        words, fits = COLUMNS[name]
        if not fits(kind.value_type if isinstance(kind, pa.DictionaryType) else kind):
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
    if not own:
        return None
    found = {**spec.sampling, **own}
    try:
        check_sampling(found)
    except InvalidJob as error:
        raise RowError(RowErrorCode.INVALID_VALUE, str(error)) from None
    return found


def _parameter(spec: JobSpec, name: str, value: Any) -> tuple[str, Any]:
    """The sampling parameter, and its value as vLLM has it."""
    if COLUMNS[name] is _WHOLE and isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with nulls in it, as pandas writes one
    kind = name.removeprefix(f"{STRUCTURED}.")
    if kind == name:
        return name, value
    # The manner is the job's, the constraint the row's.
    manners = {k: v for k, v in (spec.sampling.get(STRUCTURED) or {}).items() if k in structured_output.MANNERS}
    return STRUCTURED, manners | {kind: [value] if kind == "choice" and isinstance(value, str) else value}


def key_of(sampling: Mapping[str, Any]) -> str:
    """The same text for the same parameters. The order inside counts: a JSON Schema's properties are answered in it."""
    return json.dumps(dict(sorted(sampling.items())))
