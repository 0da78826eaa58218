"""A job whose rows are requests, on an engine that computes prompts: each request is taken apart and put together."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline.engines import arrow_text
from pipeline.engines.base import Cancellation, Engine, ResultBatch, RowBatch, RowFailure
from pipeline.engines.generation import request_rows
from pipeline.engines.pooling import unit_length
from pipeline.requests import responses
from pipeline.requests.body import Request, parse
from pipeline.requests.faults import invalid
from pipeline.requests.job import INPUT, endpoint_of, engine_spec, honoured
from pipeline.requests.responses import Answer
from pipeline.spec.error_codes import MESSAGE_LIMIT, RowErrorCode
from pipeline.spec.job_spec import JobSpec, Task
from pipeline.spec.result_columns import fields_of
from storage.errors import RowError

ITEM_ROWS = 1024
"""Most prompts of requests that are handed to the engine together."""
_UNIT = 1e-3
"""How far a vector's length may be from 1 for the vector to count as one of unit length."""


class Computes(Protocol):
    """The part of :class:`pipeline.engines.base.Engine` that rows go through."""

    def result_schema(self, spec: JobSpec) -> pa.Schema: ...

    def infer(self, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation) -> Iterator[ResultBatch]: ...


def answering(engine: Engine, spec: JobSpec) -> Computes:
    """``engine``; or, for a job whose rows are requests, what answers them with it."""
    return engine if spec.request_column is None else _RequestRows(engine)


class _RequestRows:
    """Rows of ``spec.request_column`` in, responses out. A prompt of a request is a row to the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def result_schema(self, spec: JobSpec) -> pa.Schema:
        """See :meth:`Engine.result_schema`. The engine's own is asked for, since it may refuse the job."""
        self._engine.result_schema(engine_spec(spec))
        return pa.schema(fields_of(spec))

    def infer(self, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation) -> Iterator[ResultBatch]:
        """See :meth:`Engine.infer`. What is wrong with a request is its row's failure."""
        call = _Call(spec, honoured(type(self._engine), spec), self.result_schema(spec))
        with closing(self._engine.infer(engine_spec(spec), call.items(batches), cancel)) as results:  # type: ignore[type-var]
            for result in results:
                yield call.gathered(result)
        if not cancel.cancelled:
            yield call.gathered(None)


@dataclass(slots=True)
class _Open:
    """A request whose prompts are inside the engine. ``request`` without its prompts."""

    row: int
    request: Request
    left: int
    answers: list[Any]
    failure: RowFailure | None = None


@dataclass(slots=True)
class _Call:
    """One ``infer`` call. Requests are taken in by the thread that draws batches, results come in by another."""

    spec: JobSpec
    honoured: frozenset[str]
    schema: pa.Schema
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: dict[int, tuple[_Open, int]] = field(default_factory=dict)
    _refused: deque[RowFailure] = field(default_factory=deque)
    _next: int = 0

    def items(self, batches: Iterable[RowBatch]) -> Iterator[RowBatch]:
        """The prompts of all requests, as rows of the engine."""
        for batch in batches:
            ids: list[int] = []
            prompts: list[Any] = []
            own: list[str] = []
            for row, body in zip(batch.rows.tolist(), self._bodies(batch), strict=True):
                try:
                    request = self._parsed(body)
                except RowError as error:
                    self._refused.append(RowFailure(row, error.code, error.message[:MESSAGE_LIMIT]))
                    continue
                ids += self._opened(row, request)
                prompts += request.prompts
                if self.spec.task is not Task.EMBED:
                    tools = request.tools.offered
                    own += [request_rows.encoded(request.sampling, tools, request.template)] * len(request.prompts)
            for at in range(0, len(ids), ITEM_ROWS):
                part = slice(at, at + ITEM_ROWS)
                yield RowBatch(np.array(ids[part], np.int64), self._columns(prompts[part], own[part]))

    def _bodies(self, batch: RowBatch) -> list[Any]:
        column = batch.columns.column(self.spec.request_column or "")
        found = arrow_text.values(column)
        return [_present(body) for body in found] if pa.types.is_struct(column.type) else found

    def _parsed(self, body: Any) -> Request:
        name = self.spec.request_column
        if body is None:
            raise RowError(RowErrorCode.MISSING_VALUE, f"column {name!r} is null")
        if isinstance(body, bytes):
            raise RowError(RowErrorCode.INVALID_UTF8, f"column {name!r} holds bytes that are not UTF-8")
        return parse(
            endpoint_of(self.spec),
            body,
            honoured=self.honoured,
            defaults=self.spec.sampling,
            template=self.spec.chat_template_kwargs,
        )

    def _opened(self, row: int, request: Request) -> list[int]:
        n = len(request.prompts)
        opened = _Open(row, replace(request, prompts=()), n, [None] * n)
        with self._lock:
            ids = list(range(self._next, self._next + n))
            self._next += n
            self._open.update({item: (opened, index) for index, item in enumerate(ids)})
        return ids

    def _columns(self, prompts: Sequence[Any], own: Sequence[str]) -> pa.RecordBatch:
        if self.spec.task is Task.EMBED:
            return pa.RecordBatch.from_arrays([pa.array(prompts, pa.string())], [INPUT])
        texts = pa.array([json.dumps(prompt, ensure_ascii=False) for prompt in prompts], pa.string())
        return pa.RecordBatch.from_arrays([texts, pa.array(own, pa.string())], schema=request_rows.SCHEMA)

    def gathered(self, result: ResultBatch | None) -> ResultBatch:
        """The requests that are complete now; with ``None``, those that were refused since the last result."""
        failures: list[RowFailure] = []
        while self._refused:
            failures.append(self._refused.popleft())
        done: list[_Open] = []
        if result is not None:
            for item, answer in zip(result.rows.tolist(), self._answers(result.values), strict=True):
                done += self._settled(item, answer, None)
            for failure in result.failures:
                done += self._settled(failure.row, None, failure)
        rows: list[int] = []
        values: list[dict[str, Any]] = []
        for each in done:
            found = each.failure or self._response(each)
            if isinstance(found, RowFailure):
                failures.append(replace(found, row=each.row))
            else:
                rows.append(each.row)
                values.append(found)
        measured = {} if result is None else result.measured
        table = pa.RecordBatch.from_arrays(
            [_array([value[item.name] for value in values], item.type) for item in self.schema], schema=self.schema
        )
        return ResultBatch(np.array(rows, np.int64), table if rows else None, tuple(failures), measured)

    def _settled(self, item: int, answer: Any, failure: RowFailure | None) -> list[_Open]:
        with self._lock:
            opened, index = self._open.pop(item)
        opened.answers[index] = answer
        opened.failure = opened.failure or failure
        opened.left -= 1
        return [opened] if opened.left == 0 else []

    def _answers(self, values: pa.RecordBatch | None) -> Iterable[Any]:
        if values is None:
            return ()
        if self.spec.task is not Task.EMBED:
            return [Answer(**row) for row in values.to_pylist()]
        vectors: Any = values.column("embedding")
        flat = vectors.flatten().to_numpy(zero_copy_only=False)
        tokens = values.column("prompt_tokens").to_pylist()
        return zip(flat.reshape(len(values), -1), tokens, strict=True)

    def _response(self, opened: _Open) -> dict[str, Any] | RowFailure:
        request, answers = opened.request, opened.answers
        if self.spec.task is Task.EMBED:
            tokens = sum(count for _, count in answers)
            try:
                vectors = [_shortened(vector, request.dimensions) for vector, _ in answers]
            except RowError as error:
                return RowFailure(opened.row, error.code, error.message)
            body = responses.embedded(request, vectors, tokens)
            only = vectors[0] if len(vectors) == 1 else None
            return {"embedding": only, "prompt_tokens": tokens, "response": _json(body)}
        body = responses.generated(request, answers, id=uuid.uuid4().hex, created=int(time.time()))
        usage = body["usage"]
        return {
            "output": answers[0].outputs[0],
            "finish_reason": body["choices"][0]["finish_reason"],
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "response": _json(body),
        }


def _json(body: Any) -> str:
    return json.dumps(body, ensure_ascii=False, allow_nan=False)


def _array(values: list[Any], kind: pa.DataType) -> Any:
    if isinstance(kind, pa.JsonType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, pa.string()))
    return pa.array(values, type=kind)


def _shortened(vector: Any, dimensions: int | None) -> Any:
    """The first numbers of a vector; of unit length again, where the whole vector was."""
    if dimensions is None:
        return vector
    if dimensions > len(vector):
        raise invalid("dimensions", f"the model's embeddings have {len(vector)} numbers")
    short = vector[:dimensions]
    is_unit = abs(float(np.linalg.norm(vector)) - 1) < _UNIT
    return unit_length(short[np.newaxis])[0] if is_unit else short


def _present(value: Any) -> Any:
    """A struct's value without its nulls: a struct has every field of every row."""
    if isinstance(value, dict):
        return {name: _present(item) for name, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value
