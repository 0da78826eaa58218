"""A job whose rows are requests, before it runs: what its input must hold, and what it is to the engine."""

from __future__ import annotations

import pyarrow as pa

from pipeline.engines import registry
from pipeline.engines.arrow_text import is_text
from pipeline.engines.base import Engine
from pipeline.engines.generation import request_rows
from pipeline.engines.generation.request_rows import AnswersRequests
from pipeline.models.model import Model
from pipeline.spec import request_fields
from pipeline.spec.job_spec import JobSpec, Task
from pipeline.spec.request_fields import CUSTOM_ID
from pipeline.spec.result_columns import names_of
from storage.errors import InvalidInput, InvalidJob

INPUT = "input"
"""The column of texts to embed, to the engine."""
_EMBED_SCHEMA = pa.schema([pa.field(INPUT, pa.string())])


def endpoint_of(spec: JobSpec) -> str:
    """The endpoint whose requests the job answers."""
    url = spec.endpoint or request_fields.endpoint_of(spec.task)
    assert url is not None
    return url


def engine_spec(spec: JobSpec) -> JobSpec:
    """The job as its engine has it: for embeddings a column of texts; for others ``request_rows`` in place of columns.
    A job without requests is what it is."""
    if spec.request_column is None or spec.task is not Task.EMBED:
        return spec
    # A text that was cut would be embedded as another one, and the response has no place to say so.
    overlong = "error" if spec.overlong == "auto" else spec.overlong
    gone = {"request_column": None, "endpoint": None, "openai_lines": False}
    return spec.model_copy(update={"column": INPUT, "overlong": overlong, **gone})


def engine_schema(spec: JobSpec, schema: pa.Schema) -> pa.Schema:
    """The columns that the engine gets, of an input with this ``schema``."""
    if spec.request_column is None:
        return schema
    return _EMBED_SCHEMA if spec.task is Task.EMBED else request_rows.SCHEMA


def honoured(kind: type[Engine], spec: JobSpec) -> frozenset[str]:
    """The parameters of a request that the engine honours. Raises :class:`InvalidJob` for one that answers none."""
    if spec.task is Task.EMBED:
        return frozenset()
    if not issubclass(kind, AnswersRequests):
        those = ", ".join(repr(name) for name in registry.names_with(AnswersRequests) if name != "fake")
        raise InvalidJob(
            f"engine {kind.name!r} does not answer requests of {endpoint_of(spec)}; {those} does", field="engine"
        )
    return kind.request_parameters()


def check_request(engine: str, spec: JobSpec, model: Model) -> None:
    """:func:`pipeline.engines.registry.check_request`, for jobs with requests as rows, too."""
    if spec.request_column is not None:
        honoured(registry.engine_class(engine), spec)
    registry.check_request(engine, engine_spec(spec), model)


def check(engine: str, spec: JobSpec, model: Model, schema: pa.Schema) -> tuple[str, ...]:
    """:func:`pipeline.engines.registry.check`, for jobs with requests as rows, too."""
    name = spec.request_column
    if name is None:
        return registry.check(engine, spec, model, schema)
    if schema.names.count(name) != 1:
        there = ", ".join(schema.names)
        raise InvalidInput(f"the input has no one column {name!r}; it has {there}", field="request_column")
    kind = schema.field(name).type
    kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    if not (is_text(kind) or isinstance(kind, pa.JsonType) or pa.types.is_struct(kind) or pa.types.is_null(kind)):
        raise InvalidInput(
            f"column {name!r} is {kind}; requests are JSON text, or structs with the fields of a request's body",
            field="request_column",
        )
    if spec.openai_lines:
        _check_names(schema)
    if spec.task is Task.EMBED:
        registry.check(engine, engine_spec(spec), model, engine_schema(spec, schema))
    return (name,)


def _check_names(schema: pa.Schema) -> None:
    there = schema.names.count(CUSTOM_ID) == 1
    if not there or not is_text(schema.field(CUSTOM_ID).type):
        raise InvalidInput(
            f"the lines of OpenAI's API name each request: the input needs a column {CUSTOM_ID!r} of text",
            field="openai_lines",
        )


def settled(engine: str, spec: JobSpec, model: Model, schema: pa.Schema) -> JobSpec:
    """:func:`pipeline.engines.registry.settled`, for jobs with requests as rows, too."""
    found = registry.settled(engine, engine_spec(spec), model, engine_schema(spec, schema))
    return spec.model_copy(update={"engine_options": found.engine_options})


def result_names(engine: str, spec: JobSpec, model: Model) -> tuple[str, ...] | None:
    """:func:`pipeline.engines.registry.result_names`, for jobs with requests as rows, too."""
    return names_of(spec) if spec.request_column is not None else registry.result_names(engine, spec, model)
