"""What every engine must do, as one pytest suite for whoever writes an engine. Needs pytest; nothing else imports it.

Name a job, and pytest does the rest::

    import pytest

    pytest.register_assert_rewrite("pipeline.engines.testing", "pipeline.engines.testing_calls")

    from pipeline.engines.testing import EngineContract

    class TestMine(EngineContract):
        job = {"engine": "mine", "model": "tests/model", "task": "embed", "column": "text"}

The engine is found by its name, as a worker finds it, so its distribution must be installed. It is loaded once for the
class, gets rows of the columns ``text`` and ``other`` (override :meth:`EngineContract.columns` for others), and must
answer them in any batches, order and number of threads. The three attributes below ``job`` may be loosened, and
:meth:`EngineContract.same` says when two results of a row agree. A class that needs more, such as a model that it
builds, overrides the fixtures ``spec``, ``model``, ``engine``, ``unloaded`` or ``make_batch``.

Nothing here sleeps or measures time: a test that hangs is ended by your suite's timeout (``pytest-timeout``).
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from pipeline.engines import registry
from pipeline.engines.base import Cancellation, Engine, EngineContext, NamesResults, RowBatch, RowFailure
from pipeline.engines.testing_calls import (
    MakeBatch,
    Source,
    cancel_when,
    collect,
    count,
    results,
    run,
    split,
    stream,
)
from pipeline.models.model import Model
from pipeline.models.resolve import resolve
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec, parse
from storage.errors import InvalidJob

__all__ = [
    "EngineContract",
    "MakeBatch",
    "Source",
    "cancel_when",
    "collect",
    "count",
    "results",
    "run",
    "split",
    "stream",
]


class EngineContract:
    """The suite. Results are compared by :meth:`same`."""

    job: ClassVar[Mapping[str, Any]] = {}
    """A job's fields without ``input`` and ``output``: ``engine``, ``model``, ``task`` and what the task needs."""
    batch_rows = 16
    """Rows in most batches."""
    many_rows = 100_000
    """Rows of a call that is stopped early: far more than the engine's window."""
    look_ahead_rows = 20_000
    """Most rows that may have been drawn when the first result comes."""

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> JobSpec:
        """The job. Short answers (``max_tokens``) keep the suite quick."""
        return parse({"input": "unused.parquet", "output": "unused", **cls.job})

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, spec: JobSpec, tmp_path_factory: pytest.TempPathFactory) -> Model:
        return resolve(spec.model, tmp_path_factory.mktemp("models"))

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, spec: JobSpec, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
        """Loaded. It may be shared with other classes: the suite leaves it usable."""
        made = cls._made(spec, model, tmp_path_factory.mktemp("cache"))
        made.load()
        yield made
        made.close()

    @pytest.fixture
    def unloaded(self, spec: JobSpec, model: Model, tmp_path: Path) -> Engine:
        """Made and not loaded: it is closed twice."""
        return self._made(spec, model, tmp_path)

    @pytest.fixture
    def make_batch(self, spec: JobSpec, model: Model) -> MakeBatch:
        """``(first, n)`` → rows ``first`` … ``first + n - 1`` of the columns that the engine's ``check`` asks for."""
        schema = self.columns(0, 1).schema
        names = list(dict.fromkeys(registry.check(spec.engine, spec, model, schema)))
        return lambda first, n: RowBatch(
            np.arange(first, first + n, dtype=np.int64), self.columns(first, n).select(names)
        )

    @classmethod
    def columns(cls, first: int, n: int) -> pa.RecordBatch:
        """Rows ``first`` … ``first + n - 1`` of the input; no two rows have the same content."""
        rows = range(first, first + n)
        return pa.record_batch(
            {
                "text": pa.array([f"number {row}" for row in rows], pa.string()),
                "other": pa.array([f"parcel {row * 7}" for row in rows], pa.string()),
            }
        )

    @classmethod
    def _made(cls, spec: JobSpec, model: Model, cache: Path) -> Engine:
        settled = registry.settled(spec.engine, spec, model, cls.columns(0, 1).schema)
        kind = registry.engine_class(spec.engine)
        return kind(model, spec.task, settled.engine_options, EngineContext(cache))

    def same(self, left: Any, right: Any) -> bool:
        """Whether two results of the same row agree. Floats may differ in the last digits between batches."""
        if isinstance(left, dict):
            return left.keys() == right.keys() and all(self.same(left[key], right[key]) for key in left)
        if isinstance(left, list):
            return len(left) == len(right) and all(self.same(a, b) for a, b in zip(left, right, strict=True))
        if isinstance(left, float):
            return math.isclose(left, right, rel_tol=1e-3, abs_tol=1e-4)
        return bool(left == right)

    # -- before anything is loaded ------------------------------------------------------------------------------------

    def test_the_class_says_what_it_does(self, engine: Engine, spec: JobSpec) -> None:
        assert spec.task in type(engine).tasks
        assert registry.engine_class(type(engine).name) is type(engine), "the entry point has the engine's own name"

    def test_check_names_the_columns_that_it_reads(
        self, engine: Engine, spec: JobSpec, model: Model, make_batch: MakeBatch
    ) -> None:
        schema = make_batch(0, 1).columns.schema
        read = type(engine).check(spec, model, schema)
        assert read
        assert set(read) <= set(schema.names)

    def test_check_refuses_a_missing_column(
        self, engine: Engine, spec: JobSpec, model: Model, make_batch: MakeBatch
    ) -> None:
        schema = make_batch(0, 1).columns.schema
        for name in type(engine).check(spec, model, schema):
            kept = pa.schema([field for field in schema if field.name != name] + [pa.field("unread", pa.date32())])
            with pytest.raises(InvalidJob) as caught:
                type(engine).check(spec, model, kept)
            assert caught.value.field, f"the refusal of a missing {name!r} names no field"

    def test_check_refuses_an_unknown_option(
        self, engine: Engine, spec: JobSpec, model: Model, make_batch: MakeBatch
    ) -> None:
        options = {**spec.engine_options, "no_such_option": 1}
        with pytest.raises(InvalidJob, match="no_such_option") as caught:
            type(engine).check(
                spec.model_copy(update={"engine_options": options}), model, make_batch(0, 1).columns.schema
            )
        assert (caught.value.field or "").startswith("engine_options"), caught.value.field

    def test_names_of_results_are_the_promised_ones(self, engine: Engine, spec: JobSpec, model: Model) -> None:
        if isinstance(engine, NamesResults) and (names := type(engine).result_names(spec, model)) is not None:
            assert tuple(engine.result_schema(spec).names) == names

    # -- results ------------------------------------------------------------------------------------------------------

    def test_one_result_for_every_row(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        answered = run(engine, spec, split(make_batch, 5 * self.batch_rows, self.batch_rows))
        assert sorted(answered) == list(range(5 * self.batch_rows))
        assert not [answer for answer in answered.values() if isinstance(answer, RowFailure)]

    def test_results_belong_to_their_rows(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        """The same content under another row number and in another batch gets the same answer."""
        n = 3 * self.batch_rows
        straight = run(engine, spec, split(make_batch, n, self.batch_rows))
        whole = make_batch(0, n)
        order = np.random.default_rng(0).permutation(n)
        mixed = RowBatch(order + 1000, whole.columns.take(pa.array(order, pa.int64())))
        answered = run(engine, spec, [mixed])
        assert sorted(answered) == list(range(1000, 1000 + n))
        for row in range(n):
            assert self.same(answered[row + 1000], straight[row]), f"row {row}"
        if n > 1:
            assert any(not self.same(straight[0], straight[row]) for row in range(1, n)), "all answers are the same"

    def test_schema_is_the_promised_one(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        promised = engine.result_schema(spec)
        assert promised.names
        assert "error" not in promised.names
        for result in engine.infer(spec, iter(split(make_batch, 20, 7)), Cancellation()):
            assert result.rows.dtype == np.int64
            if result.values is None:
                assert len(result.rows) == 0
            else:
                assert result.values.schema.equals(promised)
                assert result.values.num_rows == len(result.rows)
                result.values.validate(full=True)

    def test_no_rows_no_results(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        assert run(engine, spec, []) == {}
        assert run(engine, spec, [make_batch(0, 0)]) == {}
        assert sorted(run(engine, spec, [make_batch(0, 0), make_batch(3, 2), make_batch(0, 0)])) == [3, 4]

    def test_batches_of_one_row(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        assert sorted(run(engine, spec, split(make_batch, 5, 1))) == [0, 1, 2, 3, 4]

    def test_sliced_columns(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        """A batch may be a window on larger buffers; nothing outside it may leak in."""
        whole = run(engine, spec, [make_batch(0, 8)])
        batch = make_batch(0, 8)
        part = run(engine, spec, [RowBatch(batch.rows[3:6], batch.columns.slice(3, 3))])
        assert sorted(part) == [3, 4, 5]
        for row, answer in part.items():
            assert self.same(answer, whole[row]), f"row {row}"

    # -- rows that cannot be computed ---------------------------------------------------------------------------------

    def test_null_is_a_missing_value(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        batch = make_batch(0, 6)
        columns = batch.columns.take(pa.array([0, None, 2, 3, None, 5], pa.int64()))
        answered = run(engine, spec, [RowBatch(batch.rows, columns)])
        assert sorted(answered) == [0, 1, 2, 3, 4, 5]
        failed = {row: answer for row, answer in answered.items() if isinstance(answer, RowFailure)}
        assert sorted(failed) == [1, 4]
        for failure in failed.values():
            assert failure.code == RowErrorCode.MISSING_VALUE
            assert any(name in failure.message for name in batch.columns.schema.names), "the message names the column"

    def test_nothing_but_nulls(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        batch = make_batch(0, 3)
        columns = batch.columns.take(pa.array([None] * 3, pa.int64()))
        answered = run(engine, spec, [RowBatch(batch.rows, columns)])
        assert {row: type(answer) for row, answer in answered.items()} == dict.fromkeys(range(3), RowFailure)

    # -- streaming ----------------------------------------------------------------------------------------------------

    def test_batches_are_drawn_lazily(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        source = Source(stream(make_batch, self.many_rows, self.batch_rows))
        with closing(results(engine, spec, source)) as found:
            next(found)
            assert source.drawn_rows <= self.look_ahead_rows
        assert not source.overlapped

    def test_nothing_is_drawn_before_the_first_result_is_asked_for(
        self, engine: Engine, spec: JobSpec, make_batch: MakeBatch
    ) -> None:
        source = Source(stream(make_batch, self.batch_rows, self.batch_rows))
        found = results(engine, spec, source)
        found.close()
        assert source.drawn == 0

    def test_two_calls_at_once(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        """Both have begun before either may end, and each gets its own rows."""
        both = threading.Barrier(2)

        def call(first: int) -> dict[int, Any]:
            def meet(n: int) -> None:
                if n == 1:
                    both.wait()

            batches = [make_batch(first + at, self.batch_rows) for at in range(0, 3 * self.batch_rows, self.batch_rows)]
            return run(engine, spec, Source(batches, meet))

        n = 3 * self.batch_rows
        with ThreadPoolExecutor(2) as pool:
            left, right = pool.map(call, (0, n))
        assert sorted(left) == list(range(n))
        assert sorted(right) == list(range(n, 2 * n))
        alone = run(engine, spec, split(make_batch, 2 * n, self.batch_rows))
        for row, answer in {**left, **right}.items():
            assert self.same(answer, alone[row]), f"row {row}"

    # -- stopping -----------------------------------------------------------------------------------------------------

    def test_cancel_after_the_first_result(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        cancel = Cancellation()
        source = Source(stream(make_batch, self.many_rows, self.batch_rows))
        with closing(results(engine, spec, source, cancel)) as found:
            answered = count(next(found))
            cancel.cancel("test")
            answered += sum(count(result) for result in found)
        assert answered < self.many_rows
        assert source.drawn_rows < self.many_rows
        self.still_works(engine, spec, make_batch)

    def test_cancel_from_another_thread(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        """The caller waits for the next result while another thread, signalled by a drawn batch, cancels."""
        cancel, begun = Cancellation(), threading.Event()
        thread = cancel_when(begun, cancel)
        source = Source(stream(make_batch, self.many_rows, self.batch_rows), lambda n: begun.set() if n == 3 else None)
        answered = run(engine, spec, source, cancel)
        thread.join()
        assert len(answered) < self.many_rows
        self.still_works(engine, spec, make_batch)

    def test_cancelled_before_it_began(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        cancel = Cancellation()
        cancel.cancel("test")
        source = Source(stream(make_batch, self.many_rows, self.batch_rows))
        assert len(run(engine, spec, source, cancel)) < self.many_rows
        assert source.drawn_rows <= self.look_ahead_rows
        self.still_works(engine, spec, make_batch)

    def test_closed_early(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        source = Source(stream(make_batch, self.many_rows, self.batch_rows))
        found = results(engine, spec, source)
        next(found)
        found.close()
        assert source.drawn_rows < self.many_rows
        drawn = source.drawn
        self.still_works(engine, spec, make_batch)
        assert source.drawn == drawn

    def test_one_call_cancelled_leaves_the_other_alone(
        self, engine: Engine, spec: JobSpec, make_batch: MakeBatch
    ) -> None:
        cancel = Cancellation()
        n = 3 * self.batch_rows
        with closing(results(engine, spec, stream(make_batch, self.many_rows, self.batch_rows), cancel)) as stopped:
            next(stopped)
            with closing(results(engine, spec, stream(make_batch, n, self.batch_rows))) as other:
                answered = collect([next(other)])
                cancel.cancel("test")
                for _ in stopped:
                    pass
                answered |= collect(other)
        assert sorted(answered) == list(range(n))

    # -- errors -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("good", [0, 3])
    def test_errors_of_the_source_come_through(
        self, engine: Engine, spec: JobSpec, make_batch: MakeBatch, good: int
    ) -> None:
        class Unreadable(Exception):
            pass

        def batches() -> Iterator[RowBatch]:
            yield from stream(make_batch, good * self.batch_rows, self.batch_rows)
            raise Unreadable

        with pytest.raises(Unreadable):
            run(engine, spec, batches())
        self.still_works(engine, spec, make_batch)

    # -- life ---------------------------------------------------------------------------------------------------------

    def test_close_without_load_and_twice(self, unloaded: Engine) -> None:
        unloaded.close()
        unloaded.close()

    def test_stats_are_json(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        run(engine, spec, [make_batch(0, 2)])
        json.dumps(engine.stats(), allow_nan=False)

    def still_works(self, engine: Engine, spec: JobSpec, make_batch: MakeBatch) -> None:
        """The engine answers another call as if nothing had happened."""
        assert sorted(run(engine, spec, [make_batch(500, 4)])) == [500, 501, 502, 503]
