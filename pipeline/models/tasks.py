"""Pure: which tasks a model can do, by what is in its directory, and what to call it in a message."""

from __future__ import annotations

from pipeline.models.model import Model
from pipeline.spec.job_spec import Task

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

GENERATED = frozenset({Task.GENERATE, Task.CHAT})

NEEDS = {
    Task.GENERATE: "an autoregressive model with its weights",
    Task.CHAT: "an autoregressive model with its weights",
    Task.EMBED: "an encoder",
    Task.CLASSIFY: "a classifier of texts, or of images as an ONNX graph",
    Task.SCORE: "a sequence classifier",
    Task.TENSOR: "an ONNX graph",
}
"""What each task needs, for messages."""


def tasks_of(model: Model) -> frozenset[Task]:
    """The tasks that the model can do, by what is in its directory."""
    tasks: set[Task] = set()
    only_graphs = bool(model.onnx_files) and not model.weights
    if model.autoregressive and not only_graphs:
        tasks |= GENERATED
    if model.onnx_files:
        tasks |= {Task.TENSOR}
    if model.sentence_transformer:
        tasks |= {Task.EMBED}
    if not model.architectures:
        # A bare graph, or a configuration that does not say: the graph itself decides, when the engine reads it.
        if model.onnx_files or model.weights:
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


def kind_of(model: Model) -> str:
    """What the model is, for messages: its first architecture, or that it is a graph."""
    name = model.architectures[0] if model.architectures else ""
    if not name:
        if model.onnx_files:
            return "an ONNX graph"
        what = "a model whose config.json names no architecture"
        return what if model.weights else f"{what}, without weights and without a graph"
    article = "an" if name[0] in "AEIOU" else "a"
    return f"{article} {name}" + (", as an ONNX graph only" if model.onnx_files and not model.weights else "")


def listed(tasks: frozenset[Task]) -> str:
    """For messages: ``embed, classify and score``, in the order of :class:`Task`."""
    names = [str(task) for task in Task if task in tasks]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
