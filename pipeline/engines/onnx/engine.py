"""The ONNX Runtime engine: embed, classify and score texts, embed and classify images, or run any tensor graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
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
from pipeline.engines.onnx.runtime import autotune, custom_ops
from pipeline.engines.onnx.runtime import layout as onnx_layout
from pipeline.engines.onnx.runtime import options as onnx_options
from pipeline.engines.onnx.runtime import signature as onnx_graph
from pipeline.engines.onnx.runtime.autotune import Bench
from pipeline.engines.onnx.runtime.calibration_feeds import Feed, feeds
from pipeline.engines.onnx.runtime.graph_cache import Graphs, n_bytes
from pipeline.engines.onnx.runtime.layout import Layout
from pipeline.engines.onnx.runtime.ort import import_runtime, installed
from pipeline.engines.onnx.runtime.run import CancelScope
from pipeline.engines.onnx.runtime.session_pool import SessionPool, memory_for_copies
from pipeline.engines.onnx.runtime.stream import PreparedRows, sample, stream
from pipeline.engines.onnx.tensor.small_rows import READ_ROWS, are_small
from pipeline.engines.onnx.tensor.tensor_model import TensorModel, tensor_results
from pipeline.models.export import Exported, exported
from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import Blame, EngineDead, InvalidJob, InvalidModel


class OnnxEngine(checks.OnnxPlacement):
    """One graph on ONNX Runtime. Speaks :class:`~pipeline.engines.base.Engine`; options: ``OnnxOptions``.

    Models: a ``.onnx`` file, or a directory with one; a Transformers or sentence-transformers checkpoint, exported into
    ``context.cache_dir`` on first use. Text tasks need ``tokenizer.json`` beside the graph; a graph of images with
    ``preprocessor_config.json`` beside it reads images.
    """

    name: ClassVar[str] = "onnx"

    def __init__(self, model: Model, task: Task, options: Mapping[str, Any], context: EngineContext) -> None:
        self._model = model
        self._task = task
        self._options = onnx_options.parse(options)
        self._context = context
        self._closed = False
        self._pool: SessionPool | None = None
        self._text: TextModel | None = None
        self._image: ImageModel | None = None
        self._tensor: TensorModel | None = None
        self._exported: Exported | None = None
        self._libraries: tuple[Path, ...] = ()
        self._graph: Path | None = None
        self._graphs: Graphs | None = None
        self._version = ""
        self._key = ""
        self._layout_from = "default"
        self._profile: Path | None = None
        self._small = False

    @property
    def batch_rows(self) -> int | None:
        """See :class:`pipeline.engines.base.ReadsMany`."""
        return READ_ROWS if self._small else None

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
        runtime = import_runtime()
        self._version = str(runtime.__version__)
        options, notify = self._options, self._context.notify
        self._libraries = custom_ops.libraries(options.custom_ops, self._context.permissions.custom_op_paths)
        # What was allowed is what is loaded: a loader looks names up elsewhere, and a link may change meanwhile.
        options = options.model_copy(update={"custom_ops": tuple(map(str, self._libraries))})
        self._options = options
        folder: TextFolder | None = None
        images = self._task is not Task.TENSOR and checks.takes_images(self._model, options)
        if images:
            checks.check_image(self._task, self._model, options)
        elif self._task is not Task.TENSOR:
            folder = checks.check_text(self._task, self._model, options)
        graph = checks.choose_graph(self._model, options)
        if graph is None:
            if folder is None:
                raise InvalidModel(
                    f"task 'tensor' runs an ONNX graph, and {self._model.path} holds none", field="model"
                )
            graph, folder = self._export(folder)
        self._graph = graph
        self._graphs = graphs = Graphs(runtime, graph, self._model, options, self._context.cache_dir)
        cached = self._remembered(runtime, graph, folder is not None)
        if cached is not None and options.sessions is None:  # the memory may have been another's when it was measured
            copies = memory_for_copies(graphs.file())
            cached = replace(cached, sessions=min(cached.sessions, max(1, copies)))
        self._pool = pool = SessionPool.open(graphs, options, notify, cached, self._profile)
        if pool.layout != cached and self._layout_from == "cache":
            self._layout_from = "default"  # measured on a device that is gone
        try:
            signature = onnx_graph.of_session(pool.session, graph)
            if images:
                recipe, fetch = read_image_folder(self._model), self._context.fetch
                self._image = ImageModel(self._task, recipe, signature, pool, options, fetch)
            elif folder is not None:
                self._text = TextModel(self._task, folder, signature, pool, options, notify)
            else:
                # As check saw it: ONNX Runtime's inference may know more of the shapes than the file says.
                mode = onnx_graph.row_mode(onnx_graph.of_file(graph) or signature, options.row_mode)
                limits, small = onnx_graph.index_limits(graph), are_small(signature, mode, n_bytes(graph))
                self._small = small and not options.masks and not options.state
                self._tensor = TensorModel(signature, mode, pool, options, notify, limits, small=self._small)
        except BaseException:
            self.close()
            raise

    def _remembered(self, runtime: Any, graph: Path, text: bool) -> Layout | None:
        if onnx_layout.fixed(self._options, text=text):
            self._layout_from = "options"
            return None
        providers = runtime.get_available_providers()
        self._key = autotune.key(self._model.digest, graph, self._task, self._version, providers, self._options)
        cached = autotune.read(self._context.cache_dir, self._key)
        if cached is not None:
            self._layout_from = "cache"
        return cached

    def _export(self, folder: TextFolder) -> tuple[Path, TextFolder]:
        self._exported = done = exported(
            folder.weights,
            "encoder" if self._task is Task.EMBED else "classifier",
            self._model.digest,
            self._context.cache_dir,
            self._context.notify,
            name=self._model.name,
            tokenizer=folder.tokenizer is None,
        )
        return done.graph, replace(folder, tokenizer=folder.tokenizer or done.tokenizer)

    def result_schema(self, spec: JobSpec) -> pa.Schema:
        """See :meth:`pipeline.engines.base.Engine.result_schema`."""
        if self._text is not None:
            return self._text.result_schema(spec)
        if self._image is not None:
            return self._image.result_schema(spec)
        if self._tensor is not None:
            return self._tensor.result_schema(spec)
        raise EngineDead("the ONNX Runtime engine is not loaded")

    def infer(self, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation) -> Iterator[ResultBatch]:
        """See :meth:`pipeline.engines.base.Engine.infer`. Rows come out by batch, longest texts of a window first."""
        if self._pool is None or self._closed:
            raise EngineDead("the ONNX Runtime engine is not loaded, or was closed", blame=Blame.OTHERS)
        self._pool.check_process()
        return stream(self._prepared(spec, batches), self._pool, cancel)

    def _prepared(self, spec: JobSpec, batches: Iterable[RowBatch]) -> Iterator[PreparedRows]:
        if self._text is not None:
            return self._text.prepare(spec, batches)
        if self._image is not None:
            return self._image.prepare(spec, batches)
        assert self._tensor is not None
        return self._tensor.prepare(spec, batches)

    def benchmark(self, spec: JobSpec, batches: Iterable[RowBatch]) -> dict[str, Any] | None:
        """Measure layouts on ``batches``, some hundred rows or more; remember the fastest for engines that load later.

        ``None`` when there is nothing to measure: no row can be run, or the options fix everything.
        """
        if self._pool is None or self._closed:
            raise EngineDead("the ONNX Runtime engine is not loaded, or was closed", blame=Blame.OTHERS)
        model = self._text or self._image or self._tensor
        assert self._graphs is not None and model is not None
        if self._layout_from == "options":
            return None
        counts = Counter(model.counts)
        try:
            # Of texts, the first window; of tensors, what was given.
            windows = list(islice(self._prepared(spec, batches), 1 if self._text is not None else None))
            tuned = Bench(self._graphs, self._options, self._pool, partial(sample, windows), CancelScope()).tune(
                text=self._text is not None
            )
        finally:
            model.counts.clear()
            model.counts.update(counts)
        if tuned is None:
            return None
        autotune.write(self._context.cache_dir, self._key, tuned)
        return tuned.told()

    @classmethod
    def feeding_options(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """See :class:`~pipeline.engines.base.FeedsGraphs`. One session is enough: nothing is run."""
        return {"sessions": 1, **options}

    def feeds(self, spec: JobSpec, batches: Iterable[RowBatch]) -> Iterator[Feed]:
        """What the graph is fed for these rows, batch by batch: graph input → array. For calibration."""
        if self._pool is None or self._closed:
            raise EngineDead("the ONNX Runtime engine is not loaded, or was closed", blame=Blame.OTHERS)
        return feeds(self._prepared(spec, batches), self._pool)

    def profiled(self, folder: Path) -> OnnxEngine:
        """See :meth:`pipeline.execution.profiling.Profiled.profiled`. It runs in this one's layout."""
        assert self._pool is not None
        layout = self._pool.layout.to_json()
        options = self._options.model_copy(update={**layout, "autotune": False})
        twin = OnnxEngine(self._model, self._task, {}, self._context)
        twin._options, twin._profile = options, folder
        twin.load()
        return twin

    def stats(self) -> dict[str, Any]:
        """Versions, real placement, how rows are batched, counters since ``load``; after ``close`` too."""
        pool, text, image, tensor = self._pool, self._text, self._image, self._tensor
        facts: dict[str, Any] = {
            "engine": self.name,
            "onnxruntime": self._version,
            "distribution": list(installed()),
            "graph": None if self._graph is None else self._graph.name,
        }
        if pool is not None:
            facts |= {"providers": list(pool.providers), "nodes": pool.placement, "layout_from": self._layout_from}
            facts |= {**pool.layout.to_json(), "kept_runs": pool.kept_runs, "kept_graph": pool.file.optimized}
        if self._libraries:
            facts["custom_ops"] = custom_ops.digests(self._libraries)
        if text is not None:
            facts |= {
                "output": text.output,
                "token_budget": text.token_budget,
                "max_length": text.tokenizer.max_length,
            }
            facts |= text.counts
        if image is not None:
            facts |= {"output": image.output, "image_batch": image.batch}
            facts |= image.counts
        if tensor is not None:
            facts |= tensor.facts()
        if self._exported is not None:
            facts["export"] = {
                "exporter": self._exported.exporter,
                "max_abs_diff": self._exported.max_abs_diff,
                "versions": self._exported.versions,
                "from_cache": self._exported.from_cache,
            }
        return facts

    def close(self) -> None:
        """Wait for the runs in flight, then free the sessions. Safe to call twice, and after a failed ``load``."""
        self._closed = True
        if self._pool is not None:
            self._pool.close()
        if self._image is not None:
            self._image.close()
