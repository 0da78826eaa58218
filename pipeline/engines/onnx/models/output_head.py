"""Pure: what a graph of texts takes, which of its outputs a task reads, and how many classes that has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.engines.model_config.text import TextFolder, label
from pipeline.engines.onnx.runtime.signature import Dim, Signature
from pipeline.spec.job_spec import Task
from storage.errors import InvalidJob, InvalidModel

INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})
"""Graph inputs that are made from a text."""
WHOLE_MODEL = "sentence_embedding"
"""What exporters call the output of a whole sentence-transformers model."""


@dataclass(frozen=True, slots=True)
class Head:
    """The output that a task reads. ``rank`` 3: token states, to be pooled; 2: a vector or logits for each text."""

    name: str
    position: int
    rank: int


def check_inputs(signature: Signature) -> tuple[int | None, int | None]:
    """Texts and tokens that the input of token ids fixes, each ``None`` where it does not.

    Raises :class:`~storage.errors.InvalidModel` for a graph that takes no text, or that wants more than a text gives.
    """
    inputs = {value.name: value for value in signature.inputs}
    if "input_ids" not in inputs:
        raise InvalidModel(f"the graph has no input 'input_ids', so it takes no text: {signature}", field="model")
    if unknown := ", ".join(sorted(inputs.keys() - INPUTS)):
        raise InvalidModel(
            f"the graph has the input {unknown}; a text gives {', '.join(sorted(INPUTS))}. Export the graph without it",
            field="model",
        )
    value = inputs["input_ids"]
    if value.dims is None or len(value.dims) != 2:
        raise InvalidModel(f"graph input {value} should have two axes: texts and tokens", field="model")
    batch, length = (dim if isinstance(dim, int) else None for dim in value.dims)
    return batch, length


def own_embedding(signature: Signature) -> Head | None:
    """The graph's own sentence embedding, which is what it is for where nothing says how to pool its token states."""
    for i, value in enumerate(signature.outputs):
        if value.name == WHOLE_MODEL and value.dtype.kind == "f" and len(value.dims or ()) == 2:
            return Head(value.name, i, 2)
    return None


def check_layers(folder: TextFolder, used: Head, width: int | None = None) -> None:
    """Refuse a graph that pools by itself where nothing says whether it applies the folder's layers, too.

    An output ``sentence_embedding`` is the whole model's. ``width``: of the output, where it is known. Raises
    :class:`~storage.errors.InvalidModel`.
    """
    if used.rank != 2 or not folder.layers:
        return
    names = ", ".join(type(layer).__name__ for layer in folder.layers)
    if used.name != WHOLE_MODEL:
        raise InvalidModel(
            f"the graph's output {used.name!r} is pooled already, and nothing says whether the modules {names} are in "
            f"it; export it with token states, or as {WHOLE_MODEL!r} with all modules"
        )
    if width is not None and folder.module_width not in (None, width):
        raise InvalidModel(
            f"the graph's {WHOLE_MODEL} has {width} numbers, and the model's modules ({names}) give "
            f"{folder.module_width}: they are not in the graph"
        )


def head(task: Task, signature: Signature) -> Head:
    """The output that ``task`` reads, by name where exporters agree on one; otherwise the first of a fitting rank.

    Raises :class:`~storage.errors.InvalidModel` when there is none, which is how a graph of the wrong kind shows.
    """
    floats = [
        (i, value) for i, value in enumerate(signature.outputs) if value.dtype.kind == "f" and value.dims is not None
    ]
    ranked = [(i, value.name, len(value.dims or ())) for i, value in floats]
    by_name = {name: (i, name, rank) for i, name, rank in ranked}
    embed = task is Task.EMBED
    names = ("last_hidden_state", "token_embeddings", WHOLE_MODEL) if embed else ("logits",)
    ranks = (3, 2) if embed else (2,)
    for name in names:
        if name in by_name and by_name[name][2] in ranks:
            i, _, rank = by_name[name]
            return Head(name, i, rank)
    for rank in ranks:
        # Logits are no embedding, and states are no logits.
        found = [item for item in ranked if item[2] == rank and not (task is Task.EMBED and item[1] == "logits")]
        if task is not Task.EMBED:
            found = [item for item in found if "embed" not in item[1] and "pool" not in item[1]]
        if found:
            return Head(found[0][1], found[0][0], rank)
    wanted = "token states [texts, tokens, width] or embeddings" if task is Task.EMBED else "logits [texts, labels]"
    outputs = ", ".join(map(str, signature.outputs))
    raise InvalidModel(f"task '{task}' needs a graph that gives {wanted}; this one gives {outputs}")


def check_classes(task: Task, width: Dim, named: Sequence[str] | None) -> None:
    """Refuse ``width`` numbers for each row where the task, or the names of the classes, want another number of them.

    ``width`` is no number where it is not known yet. Raises :class:`~storage.errors.InvalidModel` and
    :class:`~storage.errors.InvalidJob`.
    """
    if not isinstance(width, int):
        return
    if task is Task.SCORE and width != 1:
        raise InvalidModel(
            f"task 'score' needs a model with one output; this one has {width}: use 'classify'", field="model"
        )
    if task is Task.CLASSIFY and named is not None and len(named) != width:
        raise InvalidJob(f"{len(named)} names for {width} classes; name each", field="engine_options.labels")


def label_column(config: Mapping[str, Any], width: int, named: Sequence[str] | None) -> pa.StringArray:
    """The names of ``width`` classes: those that the job ``named``; without any, those of ``config.json``."""
    return pa.array(named or [label(config, at) for at in range(width)], pa.string())
