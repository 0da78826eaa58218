"""The ``fake`` engine: every task, deterministic by the row's content, no model; with scripted faults, for tests.

It answers as the real ones do, with the same columns and the same row errors. ``generate`` and ``chat`` give
``"fake:<8 hex digits> <beginning of the prompt>"``, ``embed`` a unit vector, ``classify`` and ``score`` numbers from
the text's SHA-256, ``tensor`` one column ``output``: the sum of the row's numbers. A token is a word.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.engines import input_columns
from pipeline.engines.arrow_text import column_type
from pipeline.engines.base import Cancellation, EngineContext, ResultBatch, RowBatch, RowFailure
from pipeline.engines.fake import faults as fake_faults
from pipeline.engines.fake import requests as fake_requests
from pipeline.engines.fake import rows as fake_rows
from pipeline.engines.generation import request_rows
from pipeline.engines.generation.sampling import check_sampling
from pipeline.engines.model_config import sentence_prompts
from pipeline.models.model import Model
from pipeline.models.tasks import GENERATED
from pipeline.spec.error_codes import RowErrorCode, request_timed_out
from pipeline.spec.job_spec import JobSpec, Task
from pipeline.spec.result_columns import fields_of
from storage.errors import Blame, EngineDead, InvalidInput, InvalidJob

SHUFFLE_WINDOW = 4
"""Batches that may overtake each other under ``shuffle``."""


class FakeEngine:
    """See the module, and :class:`pipeline.engines.fake.faults.FakeOptions` for what can be made to go wrong."""

    name: ClassVar[str] = "fake"
    tasks: ClassVar[frozenset[Task]] = frozenset(Task)

    @classmethod
    def fits(cls, task: Task, model: Model) -> bool:
        """See :class:`~pipeline.engines.base.FitsModels`: the model ``fake``, which has no files."""
        return model.path is None

    @classmethod
    def timed_tasks(cls) -> frozenset[Task]:
        """See :class:`~pipeline.engines.base.TimesOutRequests`."""
        return cls.tasks

    def __init__(self, model: Model, task: Task, options: Mapping[str, Any], context: EngineContext) -> None:
        self._options = fake_faults.parse(options)
        self._faults = fake_faults.Faults(self._options)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._died: EngineDead | None = None

    @classmethod
    def check(cls, spec: JobSpec, model: Model, schema: pa.Schema) -> tuple[str, ...]:
        """See :meth:`pipeline.engines.base.Engine.check`."""
        cls.check_request(spec, model)
        if spec.task is Task.TENSOR:
            return _tensor_columns(spec, schema)
        check = input_columns.check_generation if spec.task in GENERATED else input_columns.check_texts
        return check(spec, schema)

    @classmethod
    def check_request(cls, spec: JobSpec, model: Model) -> None:
        """See :class:`pipeline.engines.base.ChecksRequests`."""
        fake_faults.parse(spec.engine_options)
        check_sampling(spec.sampling)
        sentence_prompts.NONE.of(spec)
        images = () if spec.task in GENERATED else ("image_column",)
        for name in ("dimensions", "embedding_type", "top_k", *images):
            if getattr(spec, name) is not None:
                raise InvalidJob("engine 'fake' does not do that; leave it away", field=name)
        if spec.overlong == "split":
            raise InvalidJob("engine 'fake' does not split texts", field="overlong")
        for name in ("logprobs", "prompt_logprobs", "logprob_token_ids"):
            if spec.sampling.get(name) is not None:
                raise InvalidJob("engine 'fake' has no probabilities", field=f"sampling.{name}")

    @classmethod
    def result_names(cls, spec: JobSpec, model: Model) -> tuple[str, ...] | None:
        """See :class:`pipeline.engines.base.NamesResults`."""
        return ("output",) if spec.task is Task.TENSOR else None

    @classmethod
    def request_parameters(cls) -> frozenset[str]:
        """See :class:`pipeline.engines.generation.request_rows.AnswersRequests`."""
        return fake_requests.HONOURED

    def load(self) -> None:
        self._faults.on_load()

    def result_schema(self, spec: JobSpec) -> pa.Schema:
        """See :meth:`pipeline.engines.base.Engine.result_schema`."""
        fields: list[Any]
        if spec.request_column is not None:
            return pa.schema(request_rows.fields())
        match spec.task:
            case Task.EMBED:
                vector = pa.list_(pa.float32(), fake_rows.WIDTH)
                fields = [pa.field("embedding", vector), pa.field("prompt_tokens", pa.int32())]
            case Task.TENSOR:
                fields = [pa.field("output", pa.float64())]
            case _:
                fields = fields_of(spec)
        return pa.schema(fields)

    def infer(self, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation) -> Iterator[ResultBatch]:
        """See :meth:`pipeline.engines.base.Engine.infer`. Draws one batch ahead, or four under ``shuffle``."""
        results = self._computed(spec, batches, cancel)
        for result in _shuffled(results) if self._options.shuffle else results:
            if cancel.cancelled:
                return
            n = len(result.rows) + len(result.failures)
            yield result
            # Only now: whoever asks for the next result has taken this one.
            self._faults.after_rows(n)

    def _computed(self, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation) -> Iterator[ResultBatch]:
        compute = (
            _Tensor(spec, cancel)
            if spec.task is Task.TENSOR
            else _Text(spec, self._options, self.result_schema(spec), cancel)
        )
        for batch in batches:
            self._check_alive(Blame.OTHERS)
            if not self._faults.before_batch(cancel):
                return
            # It was inside while it waited.
            self._check_alive(Blame.OWN)
            try:
                texts, result = compute(batch, self._faults)
            except EngineDead as error:
                self._died = error
                raise
            self._faults.computed(len(batch.rows))
            with self._lock:
                self._counts["rows"] += len(batch.rows)
                self._counts["failed_rows"] += len(result.failures)
                for name in ("prompt_tokens", "completion_tokens"):
                    if result.values is not None and name in result.values.schema.names:
                        self._counts[name] += int(result.values.column(name).to_numpy().sum())
            yield from self._broken(batch, texts, result)

    def _broken(self, batch: RowBatch, texts: list[str | None], result: ResultBatch) -> Iterator[ResultBatch]:
        """The result, less or more what the script says."""
        dropped = _matching(batch, texts, self._options.drop_row)
        yield _without(result, dropped) if dropped else result
        doubled = _matching(batch, texts, self._options.double_row)
        if doubled:
            yield _without(result, set(batch.rows.tolist()) - doubled)

    def _check_alive(self, blame: Blame) -> None:
        if self._died is not None:
            raise EngineDead(f"died under another call too: {self._died}", blame=blame)

    def stats(self) -> dict[str, Any]:
        """Rows and tokens since load."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Nothing to free."""


class _Text:
    """One call's rows to results, for every task but ``tensor``."""

    def __init__(
        self, spec: JobSpec, options: fake_faults.FakeOptions, schema: pa.Schema, cancel: Cancellation
    ) -> None:
        self._spec, self._cancel = spec, cancel
        self._options = options
        self._schema = schema
        self._read = fake_rows.reader(spec) if spec.request_column is None else fake_requests.texts_of

    def __call__(self, batch: RowBatch, faults: fake_faults.Faults) -> tuple[list[str | None], ResultBatch]:
        texts, failures = self._read(batch.columns, len(batch.rows))
        if self._spec.prefix:
            texts = [None if text is None else self._spec.prefix + text for text in texts]
        if self._spec.task in GENERATED and "" in texts:
            for at, text in enumerate(texts):
                if text == "":
                    failures[at] = (RowErrorCode.INVALID_VALUE, "the prompt is empty")
        faults.on_texts(texts)
        self._limit(texts, failures)
        _time_out(self._spec, texts, faults, failures, self._cancel)
        refused = self._options.fail_rows_matching
        if refused is not None:
            for at, text in enumerate(texts):
                if text is not None and refused in text:
                    failures[at] = (RowErrorCode.ENGINE_REFUSED, f"scripted: the row contains {refused!r}")
        found = [at for at, text in enumerate(texts) if text is not None and at not in failures]
        good = [texts[at] or "" for at in found]
        names = self._schema.names
        if self._spec.request_column is not None:
            columns = fake_requests.answers(batch.columns, found, good, names)
        elif self._spec.task in GENERATED:
            n, most = self._spec.sampling.get("n", 1), self._spec.sampling.get("max_tokens")
            columns = fake_rows.answer_columns([fake_rows.answer_to(text, n, most) for text in good], good, names)
        else:
            columns = fake_rows.pooled(self._spec, good)
        arrays = [pa.array(columns[field.name], field.type) for field in self._schema]
        values = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        return texts, _result(batch, values, failures)

    def _limit(self, texts: list[str | None], failures: dict[int, fake_rows.Failure]) -> None:
        most = self._options.max_prompt_tokens
        if most is None:
            return
        error = self._spec.overlong == "error" or (self._spec.overlong == "auto" and self._spec.task in GENERATED)
        for at, text in enumerate(texts):
            words = [] if text is None else text.split()
            if len(words) > most and error:
                message = f"the prompt has {len(words)} tokens; the model takes {most}"
                failures[at] = (RowErrorCode.PROMPT_TOO_LONG, message)
            elif len(words) > most:
                texts[at] = " ".join(words[:most])


class _Tensor:
    """One call's rows to results, for ``tensor``."""

    def __init__(self, spec: JobSpec, cancel: Cancellation) -> None:
        self._spec, self._cancel = spec, cancel
        self._names = tuple(spec.inputs.values()) if spec.inputs else None

    def __call__(self, batch: RowBatch, faults: fake_faults.Faults) -> tuple[list[str | None], ResultBatch]:
        total = np.zeros(len(batch.rows))
        failures: dict[int, fake_rows.Failure] = {}
        for name in self._names or batch.columns.schema.names:
            sums, nulls = fake_rows.row_sums(batch.columns.column(name))
            total += sums
            for at in np.flatnonzero(nulls).tolist():
                failures.setdefault(at, (RowErrorCode.MISSING_VALUE, f"column {name!r} is null, or holds a null"))
        texts: list[str | None] = [str(number) for number in total.tolist()]
        faults.on_texts(texts)
        _time_out(self._spec, texts, faults, failures, self._cancel)
        good = np.ones(len(total), dtype=bool)
        good[list(failures)] = False
        return texts, _result(batch, pa.RecordBatch.from_arrays([pa.array(total[good])], ["output"]), failures)


def _time_out(
    spec: JobSpec,
    texts: list[str | None],
    faults: fake_faults.Faults,
    failures: dict[int, fake_rows.Failure],
    cancel: Cancellation,
) -> None:
    for at in faults.aborted(texts, spec.request_timeout, cancel):
        failures.setdefault(at, (RowErrorCode.REQUEST_TIMEOUT, request_timed_out(spec.request_timeout)))


def _tensor_columns(spec: JobSpec, schema: pa.Schema) -> tuple[str, ...]:
    if not spec.inputs:
        numeric = tuple(field.name for field in schema if fake_rows.is_numeric(field.type))
        if not numeric:
            raise InvalidInput("the input has no column of numbers, and task 'tensor' needs one", field="input")
        return numeric
    for key, name in spec.inputs.items():
        kind = column_type(schema, name, f"inputs.{key}")
        if not fake_rows.is_numeric(kind):
            wanted = "numbers, or lists or tensors of them"
            raise InvalidInput(f"column {name!r} is {kind}; task 'tensor' needs {wanted}", field=f"inputs.{key}")
    return tuple(dict.fromkeys(spec.inputs.values()))


def _result(batch: RowBatch, values: pa.RecordBatch, failures: Mapping[int, fake_rows.Failure]) -> ResultBatch:
    rows = batch.rows
    if failures:
        good = np.ones(len(rows), dtype=bool)
        good[list(failures)] = False
        rows = rows[good]
    failed = tuple(RowFailure(int(batch.rows[at]), code, text) for at, (code, text) in sorted(failures.items()))
    return ResultBatch(rows, values, failed)


def _matching(batch: RowBatch, texts: list[str | None], needle: str | None) -> set[int]:
    if needle is None:
        return set()
    return {int(row) for row, text in zip(batch.rows, texts, strict=True) if text is not None and needle in text}


def _without(result: ResultBatch, rows: set[int]) -> ResultBatch:
    keep = np.array([int(row) not in rows for row in result.rows], dtype=bool)
    values = None if result.values is None else result.values.filter(pa.array(keep))
    return ResultBatch(result.rows[keep], values, tuple(f for f in result.failures if f.row not in rows))


def _shuffled(results: Iterator[ResultBatch]) -> Iterator[ResultBatch]:
    """Out of order within a window, by a generator whose seed is always the same."""
    chance = random.Random(0)  # noqa: S311 - an order, not a secret
    held: list[ResultBatch] = []
    for result in results:
        order = list(range(len(result.rows)))
        chance.shuffle(order)
        values = None if result.values is None else result.values.take(pa.array(order, pa.int64()))
        held.append(ResultBatch(result.rows[order], values, result.failures))
        if len(held) == SHUFFLE_WINDOW:
            yield held.pop(chance.randrange(len(held)))
    chance.shuffle(held)
    yield from held
