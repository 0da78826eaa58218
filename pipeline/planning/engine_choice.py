"""Pure: which engine runs a task on a model, and which tasks a model can do at all."""

from __future__ import annotations

from pipeline.models.model import Model
from pipeline.spec.job_spec import Task
from storage.errors import InvalidJob, InvalidModel

AUTO = "auto"
FAKE, VLLM, ONNX = "fake", "vllm", "onnx"

TASKS_OF: dict[str, frozenset[Task]] = {
    VLLM: frozenset({Task.GENERATE, Task.CHAT, Task.EMBED, Task.CLASSIFY, Task.SCORE}),
    ONNX: frozenset({Task.EMBED, Task.CLASSIFY, Task.SCORE, Task.TENSOR}),
}
"""What the two engines of this package do. Others say it themselves, when they are asked for by name."""

_OTHER_HEADS = (
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForImageClassification",
    "ForAudioClassification",
    "ForObjectDetection",
    "ForSemanticSegmentation",
    "ForCTC",
)
"""Endings of architectures that compute something no text task asks for; their graphs run under ``tensor``."""


_GENERATED = frozenset({Task.GENERATE, Task.CHAT})
_DECODERS = frozenset(
    f"{family}Model" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3", "GPTNeoX")
)
"""Decoders without a head: what embeds with them is the last token, after far more parameters than an encoder has."""


def choose(task: Task, engine_asked: str, model: Model) -> str:
    """The engine's name: the one that was asked for, or for ``auto`` the one that fits task and model.

    Raises :class:`InvalidModel` when the model cannot do the task, naming its kind and what it can do, and
    :class:`InvalidJob` when the engine that was asked for cannot.
    """
    if model.path is None:
        if engine_asked not in (AUTO, FAKE):
            raise InvalidJob(f"model 'fake' runs on engine 'fake' only, not on {engine_asked!r}", field="engine")
        return FAKE
    if engine_asked not in (AUTO, *TASKS_OF):
        return engine_asked
    if engine_asked != AUTO and task not in TASKS_OF[engine_asked]:
        raise InvalidJob(
            f"engine '{engine_asked}' does {_listed(TASKS_OF[engine_asked])}, not {task}; leave the engine to 'auto'",
            field="engine",
        )
    fitting = tasks_of(model) | (_pooled(model) if engine_asked == VLLM else frozenset())
    if task not in fitting:
        can = f"it can {_listed(fitting)}" if fitting else "none of the tasks fits it"
        raise InvalidModel(f"task '{task}' needs {_NEEDS[task]}; {model.name} is {_kind(model)}: {can}", field="model")
    if engine_asked != AUTO:
        return engine_asked
    return VLLM if task in _GENERATED or (task is Task.EMBED and _embeds_by_decoding(model)) else ONNX


def _embeds_by_decoding(model: Model) -> bool:
    """Whether it is a decoder that was made to embed, which runs on vLLM's kernels as other decoders do."""
    made = model.sentence_transformer and model.autoregressive
    return not model.onnx_files and (made or any(name in _DECODERS for name in model.architectures))


def _pooled(model: Model) -> frozenset[Task]:
    """What vLLM may pool this model for, where it is asked to; it says no itself when it loads the model."""
    if not model.architectures or (model.onnx_files and not model.weights):
        return frozenset()
    if model.autoregressive:
        return frozenset({Task.EMBED, Task.CLASSIFY, Task.SCORE})
    can = tasks_of(model) & TASKS_OF[VLLM]
    # Two embeddings have a score, too: the cosine between them.
    return can | {Task.SCORE} if Task.EMBED in can else can


def tasks_of(model: Model) -> frozenset[Task]:
    """The tasks that the model can do, by what is in its directory."""
    tasks: set[Task] = set()
    only_graphs = bool(model.onnx_files) and not model.weights
    if model.autoregressive and not only_graphs:
        tasks |= _GENERATED
    if model.onnx_files:
        tasks |= {Task.TENSOR}
    if model.sentence_transformer:
        tasks |= {Task.EMBED}
    if not model.architectures:
        # A bare graph, or a configuration that does not say: the graph itself decides, when the engine reads it.
        tasks |= {Task.EMBED, Task.CLASSIFY, Task.SCORE}
    elif any(name.endswith("ForSequenceClassification") for name in model.architectures):
        tasks |= {Task.CLASSIFY, Task.SCORE}
    elif model.autoregressive:
        tasks |= {Task.EMBED} if model.onnx_files else set()
    elif any(name.endswith("ForImageClassification") for name in model.architectures):
        tasks |= {Task.CLASSIFY} if model.onnx_files else set()
    elif not any(name.endswith(_OTHER_HEADS) for name in model.architectures):
        tasks |= {Task.EMBED}
    return frozenset(tasks)


_NEEDS = {
    Task.GENERATE: "an autoregressive model with its weights",
    Task.CHAT: "an autoregressive model with its weights",
    Task.EMBED: "an encoder (engine 'vllm' embeds with decoders, too)",
    Task.CLASSIFY: "a classifier of texts, or of images as an ONNX graph",
    Task.SCORE: "a sequence classifier",
    Task.TENSOR: "an ONNX graph",
}


def _kind(model: Model) -> str:
    name = model.architectures[0] if model.architectures else ""
    if not name:
        return "an ONNX graph" if model.onnx_files else "a model whose config.json names no architecture"
    article = "an" if name[0] in "AEIOU" else "a"
    return f"{article} {name}" + (", as an ONNX graph only" if model.onnx_files and not model.weights else "")


def _listed(tasks: frozenset[Task]) -> str:
    names = [str(task) for task in Task if task in tasks]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
