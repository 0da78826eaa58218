"""The ONNX Runtime engine: embed, classify and score texts, embed and classify images, or run any tensor graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from pipeline.engines.base import Cancellation, EngineContext, Permissions, ResultBatch, RowBatch
from pipeline.engines.model_config import prompt_notices
from pipeline.engines.model_config.image import read as read_image_folder
from pipeline.engines.model_config.text import TextFolder
from pipeline.engines.onnx import checks
from pipeline.engines.onnx.models.image_model import ImageModel
from pipeline.engines.onnx.models.text_model import TextModel
from pipeline.engines.onnx.runtime import autotune, custom_ops, diagnosis
from pipeline.engines.onnx.runtime import layout as onnx_layout
from pipeline.engines.onnx.runtime import options as onnx_options
from pipeline.engines.onnx.runtime import signature as onnx_graph
from pipeline.engines.onnx.runtime.autotune import Bench
from pipeline.engines.onnx.runtime.graph_cache import Graphs, n_bytes
from pipeline.engines.onnx.runtime.graph_model import GraphModel
from pipeline.engines.onnx.runtime.ort import import_runtime, installed
from pipeline.engines.onnx.runtime.run import CancelScope
from pipeline.engines.onnx.runtime.session_pool import SessionPool, memory_for_copies
from pipeline.engines.onnx.runtime.stream import Feed, feeds, sample, stream
from pipeline.engines.onnx.tensor.small_rows import READ_ROWS, are_small
from pipeline.engines.onnx.tensor.tensor_model import TensorModel, tensor_results
from pipeline.models.export import Exported, exported
from pipeline.models.model import Model
from pipeline.models.tasks import tasks_of
from pipeline.spec.check import Check
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import Blame, EngineDead, InvalidJob, InvalidModel


class OnnxEngine:
    """One graph on ONNX Runtime. Speaks :class:`~pipeline.engines.base.Engine`; options: ``OnnxOptions``.

    Models: a ``.onnx`` file, or a directory with one; a Transformers or sentence-transformers checkpoint, exported into
    ``context.cache_dir`` on first use. Text tasks need ``tokenizer.json`` beside the graph; a graph of images with
    ``preprocessor_config.json`` beside it reads images.
    """

    name: ClassVar[str] = "onnx"
    tasks: ClassVar[frozenset[Task]] = frozenset({Task.EMBED, Task.CLASSIFY, Task.SCORE, Task.TENSOR})

    def __init__(self, model: Model, task: Task, options: Mapping[str, Any], context: EngineContext) -> None:
        self._model = model
        self._task = task
        self._options = onnx_options.parse(options)
        self._context = context
        self._profile: Path | None = None
        self._closed = False
        self._loaded: _Loaded | None = None

    @property
    def batch_rows(self) -> int | None:
        """See :class:`pipeline.engines.base.ReadsMany`."""
        return READ_ROWS if self._loaded is not None and self._loaded.model.small_rows else None

    @classmethod
    def fits(cls, task: Task, model: Model) -> bool:
        """See :class:`~pipeline.engines.base.FitsModels`."""
        return model.path is not None and task in cls.tasks & tasks_of(model)

    @classmethod
    def tasks_with(cls, model: Model) -> frozenset[Task]:
        """See :class:`~pipeline.engines.base.NamesTasks`."""
        return tasks_of(model)

    @classmethod
    def package(cls) -> tuple[str, str]:
        """See :class:`~pipeline.engines.base.NeedsPackage`."""
        return "onnxruntime", "rowmill[onnx], or rowmill[onnx-gpu] where there is a GPU"

    @classmethod
    def stateful_tasks(cls) -> frozenset[Task]:
        """See :class:`~pipeline.engines.base.CarriesState`: graphs whose state the option ``state`` names."""
        return frozenset({Task.TENSOR})

    @classmethod
    def diagnose(cls, *, deep: bool) -> Iterator[Check]:
        """See :class:`~pipeline.engines.base.Diagnoses`."""
        return diagnosis.checks()

    @classmethod
    def check(cls, spec: JobSpec, model: Model, schema: pa.Schema) -> tuple[str, ...]:
        """See :meth:`pipeline.engines.base.Engine.check`. Neither ONNX Runtime nor the model's weights are loaded."""
        cls.check_request(spec, model)
        options = onnx_options.parse(spec.engine_options)
        if spec.task is not Task.TENSOR:
            check = checks.check_image_column if checks.takes_images(model, options) else checks.check_text_columns
            return check(spec, schema)
        signature = checks.signature_of(model, options)
        if signature is None:  # it cannot be read here: load finds out what is read, and every row is checked
            return checks.check_any_columns(spec, schema)
        mode = checks.settled_mode(spec, options, signature, schema)
        return checks.check_tensor_columns(spec, options, signature, mode, schema)

    @classmethod
    def notices(cls, spec: JobSpec, model: Model) -> Iterator[str]:
        """See :class:`~pipeline.engines.base.GivesNotices`."""
        return prompt_notices.notices(spec, model)

    @classmethod
    def settle(cls, spec: JobSpec, model: Model, schema: pa.Schema) -> Mapping[str, Any]:
        """See :class:`~pipeline.engines.base.SettlesOptions`: ``row_mode`` may follow from what the columns hold."""
        return checks.settled_options(spec, model, schema)

    @classmethod
    def check_request(cls, spec: JobSpec, model: Model) -> None:
        """See :class:`~pipeline.engines.base.ChecksRequests`."""
        if spec.task not in cls.tasks:
            able = ", ".join(sorted(cls.tasks))
            raise InvalidModel(f"engine 'onnx' does {able}, not {spec.task}", field="task")
        if spec.request_timeout is not None:
            remedy = "set its option row_timeout (--set row_timeout=SECONDS)"
            raise InvalidJob(f"engine 'onnx' aborts no single rows; {remedy}", field="request_timeout")
        options = onnx_options.parse(spec.engine_options)
        if spec.task is Task.TENSOR:
            checks.check_tensor(spec, model, options)
        elif checks.takes_images(model, options):
            checks.check_image(spec.task, model, options, spec.pooling)
            checks.check_embedding(spec, unit_length=spec.normalize is True)
            checks.check_no_prompt(spec, f"{model.name} takes images, which have no prompt")
        else:
            folder = checks.check_text(spec.task, model, options, spec.pooling)
            checks.check_embedding(spec, unit_length=folder.unit_length(spec))
            if spec.task is Task.EMBED:
                checks.check_prompt(spec, folder)

    @classmethod
    def result_names(cls, spec: JobSpec, model: Model) -> tuple[str, ...] | None:
        """See :class:`~pipeline.engines.base.NamesResults`."""
        if spec.task is not Task.TENSOR:
            return None
        options = onnx_options.parse(spec.engine_options)
        signature = checks.signature_of(model, options)
        return None if signature is None else tensor_results(signature, options)

    @classmethod
    def host_needs(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        """See :class:`~pipeline.engines.base.NeedsOfHost`: the providers that were named."""
        asked = onnx_options.parse(options)
        named = () if asked.providers is None or asked.allow_fallback else asked.providers
        return {name: "engine_options.providers" for name, _ in named}

    @classmethod
    def host_offers(cls) -> frozenset[str]:
        """See :class:`~pipeline.engines.base.NeedsOfHost`: the providers in this machine's ONNX Runtime."""
        return frozenset(import_runtime().get_available_providers())

    @classmethod
    def check_permissions(cls, options: Mapping[str, Any], permissions: Permissions) -> None:
        """See :class:`~pipeline.engines.base.RestrictsOptions`."""
        custom_ops.libraries(options.get("custom_ops"), permissions.custom_op_paths)

    def load(self) -> None:
        """Export where needed, open the sessions, run one sample. See :meth:`pipeline.engines.base.Engine.load`."""
        runtime, options = import_runtime(), self._options
        libraries = custom_ops.libraries(options.custom_ops, self._context.permissions.custom_op_paths)
        # What was allowed is what is loaded: a loader looks names up elsewhere, and a link may change meanwhile.
        options = self._options = options.model_copy(update={"custom_ops": tuple(map(str, libraries))})
        images = self._task is not Task.TENSOR and checks.takes_images(self._model, options)
        folder: TextFolder | None = None
        if images:
            checks.check_image(self._task, self._model, options)
        elif self._task is not Task.TENSOR:
            folder = checks.check_text(self._task, self._model, options)
        graph = checks.choose_graph(self._model, options)
        export: Exported | None = None
        if graph is None:
            if folder is None:
                raise checks.without_a_graph(self._model)
            export = self._export(folder)
            graph, folder = export.graph, replace(folder, tokenizer=folder.tokenizer or export.tokenizer)
        graphs = Graphs(runtime, graph, self._model, options, self._context.cache_dir)
        key, cached, origin = None, None, "options"
        if not onnx_layout.fixed(options, text=folder is not None):
            providers = runtime.get_available_providers()
            key = autotune.key(self._model.digest, graph, self._task, runtime.__version__, providers, options)
            cached = autotune.read(self._context.cache_dir, key)
            origin = "default" if cached is None else "cache"
        if cached is not None and options.sessions is None:  # the memory may have been another's when it was measured
            copies = memory_for_copies(graphs.file())
            cached = replace(cached, sessions=min(cached.sessions, max(1, copies)))
        pool = SessionPool.open(graphs, options, self._context.notify, cached, self._profile)
        if pool.layout != cached and origin == "cache":
            origin = "default"  # measured on a device that is gone
        try:
            model = self._model_of(graph, pool, folder, images=images)
        except BaseException:
            pool.close()
            raise
        self._loaded = _Loaded(runtime.__version__, graphs, pool, model, key, origin, export, libraries)

    def _model_of(self, graph: Path, pool: SessionPool, folder: TextFolder | None, *, images: bool) -> GraphModel:
        options, notify = self._options, self._context.notify
        signature = onnx_graph.of_session(pool.session, graph)
        if images:
            recipe = read_image_folder(self._model)
            return ImageModel(self._task, recipe, signature, pool, options, self._context.fetch)
        if folder is not None:
            return TextModel(self._task, folder, signature, pool, options, notify)
        # As check saw it: ONNX Runtime's inference may know more of the shapes than the file says.
        mode = onnx_graph.row_mode(onnx_graph.of_file(graph) or signature, options.row_mode)
        small = are_small(signature, mode, n_bytes(graph))
        return TensorModel(signature, mode, pool, options, notify, onnx_graph.index_limits(graph), small=small)

    def _export(self, folder: TextFolder) -> Exported:
        return exported(
            folder.weights,
            "encoder" if self._task is Task.EMBED else "classifier",
            self._model.digest,
            self._context.cache_dir,
            self._context.notify,
            name=self._model.name,
            tokenizer=folder.tokenizer is None,
        )

    def _running(self) -> _Loaded:
        if self._loaded is None or self._closed:
            raise EngineDead("the ONNX Runtime engine is not loaded, or was closed", blame=Blame.OTHERS)
        return self._loaded

    def result_schema(self, spec: JobSpec) -> pa.Schema:
        """See :meth:`pipeline.engines.base.Engine.result_schema`."""
        return (self._loaded or self._running()).model.result_schema(spec)

    def infer(self, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation) -> Iterator[ResultBatch]:
        """See :meth:`pipeline.engines.base.Engine.infer`. Rows come out by batch, longest texts of a window first."""
        loaded = self._running()
        loaded.pool.check_process()
        return stream(loaded.model.prepare(spec, batches), loaded.pool, cancel)

    def benchmark(self, spec: JobSpec, batches: Iterable[RowBatch]) -> dict[str, Any] | None:
        """Measure layouts on ``batches``, some hundred rows or more; remember the fastest for engines that load later.

        ``None`` when there is nothing to measure: no row can be run, or the options fix everything.
        """
        loaded = self._running()
        if loaded.key is None:
            return None
        model, text = loaded.model, isinstance(loaded.model, TextModel)
        counts = Counter(model.counts)
        try:
            # Of texts, the first window; of tensors, what was given.
            windows = list(islice(model.prepare(spec, batches), 1 if text else None))
            bench = Bench(loaded.graphs, self._options, loaded.pool, partial(sample, windows), CancelScope())
            tuned = bench.tune(text=text)
        finally:
            model.counts.clear()
            model.counts.update(counts)
        if tuned is None:
            return None
        autotune.write(self._context.cache_dir, loaded.key, tuned)
        return tuned.to_json()

    @classmethod
    def feeding_options(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """See :class:`~pipeline.engines.base.FeedsGraphs`. One session is enough: nothing is run."""
        return {"sessions": 1, **options}

    def feeds(self, spec: JobSpec, batches: Iterable[RowBatch]) -> Iterator[Feed]:
        """What the graph is fed for these rows, batch by batch: graph input → array. For calibration."""
        loaded = self._running()
        return feeds(loaded.model.prepare(spec, batches), loaded.pool)

    def profiled(self, folder: Path) -> OnnxEngine:
        """See :meth:`pipeline.execution.profiling.Profiled.profiled`. It runs in this one's layout."""
        layout = self._running().pool.layout.to_json()
        twin = OnnxEngine(self._model, self._task, {}, self._context)
        twin._options = self._options.model_copy(update={**layout, "autotune": False})
        twin._profile = folder
        twin.load()
        return twin

    def stats(self) -> dict[str, Any]:
        """Versions, real placement, how rows are batched, counters since ``load``; after ``close`` too."""
        facts: dict[str, Any] = {"engine": self.name, "distribution": list(installed())}
        return facts if self._loaded is None else facts | self._loaded.facts()

    def close(self) -> None:
        """Wait for the runs in flight, then free the sessions. Safe to call twice, and after a failed ``load``."""
        self._closed = True
        if self._loaded is not None:
            self._loaded.model.close()


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What :meth:`OnnxEngine.load` made. ``key``: under which a measured layout is remembered; ``None`` where the
    options leave nothing to measure. ``layout_from``: ``options``, ``cache`` or ``default``."""

    version: str
    graphs: Graphs
    pool: SessionPool
    model: GraphModel
    key: str | None
    layout_from: str
    export: Exported | None
    libraries: tuple[Path, ...]

    def facts(self) -> dict[str, Any]:
        pool = self.pool
        facts: dict[str, Any] = {
            "onnxruntime": self.version,
            "graph": self.graphs.raw.name,
            "providers": list(pool.providers),
            "nodes": pool.placement,
            "layout_from": self.layout_from,
            **pool.layout.to_json(),
            "kept_runs": pool.kept_runs,
            "kept_graph": pool.file.optimized,
        }
        if self.libraries:
            facts["custom_ops"] = custom_ops.digests(self.libraries)
        facts |= self.model.facts()
        if self.export is not None:
            names = ("exporter", "max_abs_diff", "versions", "from_cache")
            facts["export"] = {name: getattr(self.export, name) for name in names}
        return facts
