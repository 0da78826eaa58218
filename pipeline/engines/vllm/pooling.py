"""Pooling models on vLLM: embed, classify and score. Prompts and results are those of ``LLM.embed|classify|score``.

vLLM's own input processors make the prompts (a cross-encoder's pair is one prompt, with token types; the two texts of a
bi-encoder or late-interaction model are two) and join what comes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engines import pooled_results as results
from pipeline.engines.arrow_text import values
from pipeline.engines.base import RowBatch, RowFailure
from pipeline.engines.model_config import sentence_prompts
from pipeline.engines.model_config.json_files import read_json
from pipeline.engines.vllm.generate_results import Answer
from pipeline.engines.vllm.process.output import first_lines
from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.engines.vllm.prompts.prompts import Prompt
from pipeline.engines.vllm.prompts.sampling_params import Params
from pipeline.engines.vllm.requests.outcome import Finished, Outcome
from pipeline.models import module_folders
from pipeline.models.model import Model
from pipeline.spec.error_codes import MESSAGE_LIMIT, RowErrorCode
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidJob, InvalidModel

TASKS = frozenset({Task.EMBED, Task.CLASSIFY, Task.SCORE})
ARGUMENTS: Mapping[str, Any] = {"runner": "pooling"}
"""Engine arguments that the task decides; what the model is converted to follows from its architecture."""


def prompt_of(spec: JobSpec, model: Model) -> str:
    """What stands before every text to embed, as sentence-transformers has it.

    Raises :class:`InvalidJob` for a prompt that the model does not have, and :class:`InvalidModel` for one that its
    pooling leaves out, which vLLM does not do.
    """
    if spec.task is not Task.EMBED:
        return ""
    if model.path is None or not model.sentence_transformer:
        return sentence_prompts.NONE.of(spec)
    prompt = sentence_prompts.read(model.path).of(spec)
    pooling = [folder for kind, folder in module_folders.read(model.path) or () if kind.endswith(".Pooling")]
    if prompt and any(read_json(folder / "config.json").get("include_prompt") is False for folder in pooling):
        raise InvalidModel(
            f"{model.name} leaves its prompt out of the pooling, which engine 'vllm' does not do; engine 'onnx' does",
            field="model",
        )
    return prompt


def check(spec: JobSpec, model: Model) -> None:
    """Raise :class:`InvalidJob` for what a pooling model on vLLM does not do."""
    prompt_of(spec, model)
    if model.sentence_transformer and spec.task is Task.EMBED and spec.dimensions is None:
        assert model.path is not None
        kept = read_json(model.path / "config_sentence_transformers.json").get("truncate_dim")
        if kept is not None:
            raise InvalidJob(
                f"the model keeps {kept} numbers of each vector (truncate_dim), which engine 'vllm' does not read: "
                f"set dimensions to {kept}",
                field="dimensions",
            )
    if spec.pooling != "auto":
        raise InvalidJob(
            f"an engine pools as it was started: leave it at 'auto', and set engine_options.pooler_config to "
            f'{{"pooling_type": "{spec.pooling.upper()}"}}',
            field="pooling",
        )
    if spec.overlong == "split":
        raise InvalidJob("engine 'vllm' does not split texts; engine 'onnx' does", field="overlong")
    if spec.embedding_type == "int8" and spec.normalize is False:
        raise InvalidJob("int8 needs embeddings of unit length; set normalize (--normalize)", field="embedding_type")
    if spec.task is Task.CLASSIFY and spec.pair_column is not None:
        raise InvalidJob("engine 'vllm' classifies single texts; pairs are for task 'score'", field="pair_column")
    if spec.task is Task.SCORE and spec.pair_column is None:
        raise InvalidJob("task 'score' needs pair_column, the text that is scored against column", field="pair_column")


class Pooling:
    """One task on one engine. Raises :class:`InvalidModel` when the model does not do it."""

    def __init__(self, running: RunningVllm, task: Task) -> None:
        from vllm.entrypoints.pooling.factories import init_pooling_io_processors
        from vllm.renderers.chat_utils import ChatTemplateConfig
        from vllm.tasks import SCORE_TYPE_MAP

        self.config = running.config.model_config
        tasks: Any = running.supported_tasks
        does = self.config.get_pooling_task(tasks)
        made = init_pooling_io_processors(
            supported_tasks=tasks,
            vllm_config=running.config,
            renderer=running.llm.renderer,
            chat_template_config=ChatTemplateConfig(chat_template=None),
        )
        name = SCORE_TYPE_MAP.get(does, "") if task is Task.SCORE else str(task)
        if name == "cross-encoder" and self.n_labels != 1:
            raise InvalidModel(
                f"task 'score' needs a model with one label; this one has {self.n_labels}: use 'classify'",
                field="model",
            )
        if name not in made:
            raise InvalidModel(f"vLLM does not {task} with this model; it pools for {does}", field="model")
        self.input = made[name]
        self.task = task
        self.pairs = task is Task.SCORE and name != "cross-encoder"
        """Whether a row is two requests."""

    @property
    def n_labels(self) -> int:
        return int(getattr(self.config.hf_config, "num_labels", 0))

    @property
    def labels(self) -> pa.StringArray:
        names = getattr(self.config.hf_config, "id2label", None) or {}
        return pa.array([str(names.get(at, f"LABEL_{at}")) for at in range(self.n_labels)], pa.string())

    def schema(self, spec: JobSpec) -> pa.Schema:
        """The result columns. Raises :class:`InvalidJob` for more dimensions than there are."""
        if self.task is Task.EMBED:
            kind = results.embedding_type(spec, int(self.config.embedding_size))
            return pa.schema([pa.field("embedding", kind), pa.field("prompt_tokens", pa.int32())])
        if self.task is Task.CLASSIFY:
            return pa.schema(results.classify_fields())
        return pa.schema([pa.field("score", pa.float32())])


class PooledRows:
    """The rows of one job. Not to be shared between threads, except for :meth:`read`."""

    def __init__(self, running: RunningVllm, pooling: Pooling, spec: JobSpec, prompt: str = "") -> None:
        from vllm.pooling_params import PoolingParams

        self._pooling, self._spec, self._prompt = pooling, spec, prompt
        task: Any = getattr(pooling.input, "pooling_task", None) or pooling.input.name
        self.params = PoolingParams(task=task, use_activation=spec.normalize if spec.task is Task.EMBED else None)
        self._columns = [name for name in (spec.column, spec.pair_column) if name is not None]
        # Nobody asked for a number of tokens: as everywhere but in generation, what does not fit is cut off.
        self._tokenization = None if spec.overlong == "error" else {"truncate_prompt_tokens": -1}
        self._half: dict[int, Answer | RowFailure] = {}
        self.requests_per_row = 2 if pooling.pairs else 1

    def read(self, batch: RowBatch, chunk: int) -> Iterator[tuple[list[Prompt], list[RowFailure]]]:
        """The prompts of a batch, ``chunk`` rows at a time, and the rows that cannot be one."""
        schema = batch.columns.schema
        columns = [values(batch.columns.column(schema.get_field_index(name))) for name in self._columns]
        rows = batch.rows.tolist()
        for start in range(0, len(rows), chunk):
            prompts: list[Prompt] = []
            failures: list[RowFailure] = []
            for index in range(start, min(start + chunk, len(rows))):
                made = self._prompts(rows[index], [column[index] for column in columns])
                if isinstance(made, RowFailure):
                    failures += self._halves(made)
                else:
                    prompts += made
            yield prompts, failures

    def _halves(self, failure: RowFailure) -> list[RowFailure]:
        if not self._pooling.pairs:
            return [failure]
        return [replace(failure, row=2 * failure.row), replace(failure, row=2 * failure.row + 1)]

    def _prompts(self, row: int, texts: Sequence[Any]) -> list[Prompt] | RowFailure:
        from vllm.exceptions import VLLMClientError

        for name, text in zip(self._columns, texts, strict=True):
            if text is None:
                return RowFailure(row, RowErrorCode.MISSING_VALUE, f"column {name!r} is null")
            if isinstance(text, bytes):
                return RowFailure(row, RowErrorCode.INVALID_UTF8, f"column {name!r} holds bytes that are not UTF-8")
        try:
            inputs = list(self._inputs(texts))
        except (VLLMClientError, ValueError, TypeError) as error:
            long = str(getattr(error, "parameter", "")).startswith("input_")
            code = RowErrorCode.PROMPT_TOO_LONG if long else RowErrorCode.INVALID_VALUE
            return RowFailure(row, code, first_lines(error, MESSAGE_LIMIT))
        if not all(made["prompts"]["prompt_token_ids"] for made in inputs):
            return RowFailure(row, RowErrorCode.INVALID_VALUE, "the text has no token")
        # The halves of a pair travel as two requests, which are told apart by the lowest bit.
        number = row * 2 if self._pooling.pairs else row
        return [
            Prompt(number + at, list(made["prompts"]["prompt_token_ids"]), Params(made["params"]))
            for at, made in enumerate(inputs)
        ]

    def _inputs(self, texts: Sequence[str]) -> Iterator[Any]:
        from vllm.entrypoints.pooling.scoring.typing import ScoringData
        from vllm.entrypoints.pooling.typing import OfflineEncodeInputsContext, OfflineScoringInputsContext

        common: dict[str, Any] = {
            "pooling_task": self.params.task,
            "tokenization_kwargs": self._tokenization,
            "lora_request": None,
            "priorities": None,
            "pooling_params": self.params,
        }
        if self._spec.task is Task.SCORE:
            pair = ScoringData(data_1=[texts[0]], data_2=[texts[1]])
            context: Any = OfflineScoringInputsContext(scoring_data=pair, chat_template=None, **common)
        else:
            context = OfflineEncodeInputsContext(prompts=[self._prompt + texts[0]], **common)
        make, _ = self._pooling.input.get_request_factory_offline(context)
        return (self._pooling.input.render(parameters) for parameters in make())

    def answers(self, outcomes: Sequence[Outcome]) -> list[Answer | RowFailure]:
        """The rows' answers, from the outcomes of requests; half a pair waits for the other half."""
        read = [self._read(done) if isinstance(done, Finished) else done for done in outcomes]
        if not self._pooling.pairs:
            return [_numbers_only(answer) for answer in read]
        found: list[Answer | RowFailure] = []
        for outcome in read:
            row, second = divmod(outcome.row, 2)
            other = self._half.pop(row, None)
            if other is None:
                self._half[row] = outcome
            else:
                found.append(_numbers_only(self._pair(row, *((other, outcome) if second else (outcome, other)))))
        return found

    def _read(self, done: Finished) -> Answer | RowFailure:
        output = done.output
        if output.error is not None:
            message = first_lines(str(output.error), MESSAGE_LIMIT)
            return RowFailure(done.prompt.row, RowErrorCode.ENGINE_REFUSED, message)
        return Answer(done.prompt.row, done.prompt_tokens, done.cached_tokens, data=output, copied=done.copied)

    def _pair(self, row: int, first: Answer | RowFailure, second: Answer | RowFailure) -> Answer | RowFailure:
        from vllm.entrypoints.pooling.typing import OfflineOutputsContext

        for half in (first, second):
            if isinstance(half, RowFailure):
                return RowFailure(row, half.code, half.message)
        assert isinstance(first, Answer) and isinstance(second, Answer)
        context = OfflineOutputsContext(outputs=[first.data, second.data], n_queries=1)
        (output,) = self._pooling.input.post_process_offline(context)
        tokens, cached = first.prompt_tokens + second.prompt_tokens, first.cached_tokens + second.cached_tokens
        return Answer(row, tokens, cached, data=output, copied=first.copied and second.copied)

    def columns(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """The values of the task's columns."""
        if not answers:
            return {}
        pooled = np.stack([_pooled(answer).float().reshape(-1).numpy() for answer in answers])
        if self._spec.task is Task.SCORE:
            return {"score": pa.array(pooled[:, 0], pa.float32())}
        if self._spec.task is Task.CLASSIFY:
            return results.classify_columns(self._spec, pooled, self._pooling.labels)
        if self._spec.dimensions is not None or self._spec.embedding_type is not None:
            pooled = results.finished(self._spec, pooled, normalize=self._spec.normalize is not False)
        tokens = pa.array([answer.prompt_tokens for answer in answers], pa.int32())
        return {"embedding": results.embedding_column(pooled), "prompt_tokens": tokens}


def _pooled(answer: Answer) -> Any:
    """The tensor. A score is what is pooled itself, or (joined from two) the output of it."""
    return getattr(answer.data.outputs, "data", answer.data.outputs)


def _numbers_only(answer: Answer | RowFailure) -> Answer | RowFailure:
    if isinstance(answer, RowFailure) or bool(_pooled(answer).isfinite().all()):
        return answer
    return RowFailure(answer.row, *results.NOT_FINITE)
