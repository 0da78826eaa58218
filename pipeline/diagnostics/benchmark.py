"""``rowmill model benchmark``: an engine's own measurement of how it should run a model, outside any job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engines import registry
from pipeline.engines.base import EngineContext, RowBatch
from pipeline.models.resolve import resolve
from pipeline.planning.engine_choice import AUTO, choose
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import CorruptFile, InvalidInput, InvalidJob
from storage.objects.store import ObjectStore
from storage.parquet.batches import readable

SIGMA = 0.9
"""Of the natural logarithm of the number of words in a made-up text."""
MEDIAN_WORDS = 17
_MOST_WORDS = 300
_BATCH_ROWS = 1024
_WORDS = """the a of to and in is it for on with as at by from this that not no yes good bad fine great small large old
new red green blue river mountain city road house tree water fire light dark day night morning evening summer winter
cat dog bird fish horse man woman child people work play read write run walk sleep eat drink make take give see hear
one two three four five six seven eight nine ten first last more less very too also only how why when where who what"""


@runtime_checkable
class Benchmarked(Protocol):
    """An engine that measures itself."""

    def benchmark(self, spec: JobSpec, batches: Iterator[RowBatch]) -> Mapping[str, Any] | None:
        """Measure on ``batches``, keep the fastest way for later jobs, and tell: ``chosen``, how it will run, and
        ``trials``, each with ``layout``, ``rows_per_second``, ``ratio`` and ``chosen``; or, for what is not chosen
        among but told, ``speeds`` (see :mod:`pipeline.engines.vllm.benchmark`). ``None``: nothing to measure.
        """
        ...


@runtime_checkable
class MakesUpPrompts(Protocol):
    """An engine class that measures itself on prompts of its own making."""

    @classmethod
    def made_up_tasks(cls) -> frozenset[Task]:
        """The tasks that it measures; no others."""
        ...


def benchmark(
    model: str,
    task: Task | None,
    context: EngineContext,
    store: ObjectStore,
    *,
    engine: str,
    options: Mapping[str, Any],
    rows: int,
    input_uri: str | None = None,
    column: str | None = None,
    pair_column: str | None = None,
) -> Mapping[str, Any]:
    """Load the model and have its engine measure it, on the first ``rows`` rows of ``input_uri`` or on made-up texts.
    ``task``, where it is left out, is ``generate`` for a language model that is not made to embed, else ``embed``.

    Raises :class:`~storage.errors.InvalidJob` naming the field: an engine without a measurement, a task that needs an
    input, and whatever the engine refuses.
    """
    found = resolve(model, context.cache_dir)
    if task is None:
        generates = engine == AUTO or Task.GENERATE in registry.engine_class(engine).tasks
        decodes = found.autoregressive and not (found.sentence_transformer or found.onnx_files) and generates
        task = Task.GENERATE if decodes else Task.EMBED
    name = choose(task, engine, found)
    kind = registry.engine_class(name)
    text = task in (Task.EMBED, Task.CLASSIFY, Task.SCORE)
    if not issubclass(kind, Benchmarked):
        raise InvalidJob(f"engine {name!r} has no measurement of its own", field="engine")
    own = kind.made_up_tasks() if issubclass(kind, MakesUpPrompts) else None
    if own is not None and task not in own:
        can = ", ".join(sorted(own))
        raise InvalidJob(f"engine {name!r} is measured with task {can}, not {task}", field="task")
    if own is not None and input_uri is not None:
        raise InvalidJob(f"engine {name!r} is measured on prompts that it makes up; leave INPUT out", field="input")
    if input_uri is None and own is None and not text:
        raise InvalidJob(f"task '{task}' is measured on rows of yours: name a Parquet file", field="input")
    spec = JobSpec(
        input=(input_uri or "made-up.parquet",),
        output="nowhere",
        model=model,
        task=task,
        engine=name,
        engine_options=dict(options),
        column=(column or "text") if text else None,
        prompt="{text}" if task is Task.GENERATE else None,
        pair_column=pair_column,
    )
    schema, batches = _texts(rows, pair_column) if input_uri is None else _first_rows(store, input_uri, rows)
    columns = kind.check(spec, found, schema)
    spec = registry.settled(name, spec, found, schema)
    made = kind(found, task, spec.engine_options, context)
    try:
        made.load()
        assert isinstance(made, Benchmarked)
        measured = made.benchmark(spec, _numbered(batches, columns))
    finally:
        made.close()
    if measured is None:
        raise InvalidJob("the options leave nothing to measure, or no row can be run", field="engine_options")
    return {"engine": name, "task": str(task), **measured}


def _numbered(batches: Iterator[pa.RecordBatch], columns: tuple[str, ...]) -> Iterator[RowBatch]:
    first = 0
    for batch in batches:
        yield RowBatch(np.arange(first, first + batch.num_rows, dtype=np.int64), batch.select(list(columns)))
        first += batch.num_rows


def _first_rows(store: ObjectStore, uri: str, rows: int) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    with readable(uri, CorruptFile, "it is no readable Parquet file"):
        file = pq.ParquetFile(store.open(uri))
    if not file.metadata.num_rows:
        raise InvalidInput(f"{uri} has no rows", field="input")

    def batches() -> Iterator[pa.RecordBatch]:
        left = rows
        with readable(uri, CorruptFile, "it cannot be read"):
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                yield batch.slice(0, left)
                left -= batch.num_rows
                if left <= 0:
                    return

    return file.schema_arrow, batches()


def _texts(rows: int, pair_column: str | None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Texts of common words, their number log-normal with median ``MEDIAN_WORDS``; the same ones every time."""
    random = np.random.default_rng(0)
    words = np.array(_WORDS.split())
    sizes = np.clip(random.lognormal(np.log(MEDIAN_WORDS), SIGMA, rows), 1, _MOST_WORDS).astype(int)
    columns = {"text": pa.array([" ".join(random.choice(words, size)) for size in sizes])}
    if pair_column is not None:
        columns[pair_column] = pa.array([" ".join(random.choice(words, 8)) for _ in range(rows)])
    batch = pa.record_batch(columns)
    return batch.schema, iter([batch])
