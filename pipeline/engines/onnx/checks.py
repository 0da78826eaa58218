"""What is refused before ONNX Runtime is loaded: wrong task for the model, missing or wrong columns, bad options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.engines.arrow_text import column_type, is_text
from pipeline.engines.media.columns import is_image
from pipeline.engines.model_config import image
from pipeline.engines.model_config.text import TextFolder
from pipeline.engines.model_config.text import read as read_folder
from pipeline.engines.onnx.models.image_model import POOLED, image_head, image_input, token_states
from pipeline.engines.onnx.models.output_head import check_classes, check_inputs, check_layers, head
from pipeline.engines.onnx.runtime import options as onnx_options
from pipeline.engines.onnx.runtime import signature as onnx_graph
from pipeline.engines.onnx.runtime.options import OnnxOptions
from pipeline.engines.onnx.runtime.signature import Dim, GraphValue, RowMode, Signature
from pipeline.engines.onnx.tensor.arrow_types import lossless, tensor_kind, turned_around
from pipeline.engines.onnx.tensor.carried_state import CarriedState
from pipeline.engines.onnx.tensor.masks import Masks
from pipeline.engines.onnx.tensor.tensor_model import column_of, made_here, row_dims
from pipeline.engines.sequence_keys import check_type
from pipeline.models.export import check_exportable
from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidInput, InvalidJob, InvalidModel


def choose_graph(model: Model, options: OnnxOptions) -> Path | None:
    """The ``.onnx`` file to run, or ``None`` when the model has none and must be exported."""
    if model.path is None:
        raise InvalidModel(f"model {model.name!r} has no files; engine 'onnx' runs models on disk", field="model")
    if model.path.is_file():
        if options.file is not None:
            raise InvalidJob(f"{model.path} is a file; 'file' chooses within a directory", field="engine_options.file")
        return model.path
    chosen = options.graph(model.path)
    if chosen is not None:
        # What is run is what the digest names: results are kept, and models compared, by it.
        if chosen.relative_to(model.path).as_posix() not in model.content:
            raise InvalidJob(
                f"{options.file} is no part of the model: hidden files, caches and what training leaves are passed "
                "over; move the graph elsewhere in the directory",
                field="engine_options.file",
            )
        return chosen
    return model.onnx_files[0] if model.onnx_files else None


def signature_of(model: Model, options: OnnxOptions) -> Signature | None:
    """The signature of the graph that task ``tensor`` runs; ``None`` where it cannot be read here (see
    :func:`pipeline.engines.onnx.runtime.signature.of_file`).

    Raises :class:`~storage.errors.InvalidModel` without a graph.
    """
    graph = choose_graph(model, options)
    if graph is None:
        raise without_a_graph(model)
    return onnx_graph.of_file(graph)


def without_a_graph(model: Model) -> InvalidModel:
    """What is raised where task ``tensor`` finds no graph."""
    return InvalidModel(f"task 'tensor' runs an ONNX graph, and {model.path} holds none", field="model")


def check_text(task: Task, model: Model, options: OnnxOptions, pooling: str = "auto") -> TextFolder:
    """Refuse a text task that the model cannot do. Raises :class:`~storage.errors.InvalidModel`, and
    :class:`~storage.errors.InvalidJob` for a pooling asked of a graph that pools by itself."""
    graph = choose_graph(model, options)
    folder = read_folder(model)
    _fitting_architecture(task, model, folder, exports=graph is None)
    if graph is None:
        check_exportable(folder.weights)
    if folder.tokenizer is None and (graph is not None or not folder.convertible_tokenizer):
        hint = "; a graph without one can run with task 'tensor'" if graph is not None else ""
        raise InvalidModel(
            f"task '{task}' needs tokenizer.json, which {folder.weights} does not hold{hint}", field="model"
        )
    signature = onnx_graph.of_file(graph) if graph is not None else None
    if signature is not None:
        check_inputs(signature)
        used = head(task, signature)
        check_classes(task, _width(signature, used.position), options.labels)
        if task is Task.EMBED:
            check_layers(folder, used)
            if used.rank == 2 and pooling != "auto":
                raise InvalidJob("the graph pools by itself; leave it at 'auto'", field="pooling")
    return folder


def _width(signature: Signature, position: int) -> Dim:
    dims = signature.outputs[position].dims
    return dims[-1] if dims else None


def _fitting_architecture(task: Task, model: Model, folder: TextFolder, *, exports: bool) -> None:
    known = folder.architectures
    names = ", ".join(known)
    if task is Task.EMBED:
        if model.autoregressive and exports and not folder.sentence_transformer:
            raise InvalidModel(
                f"{model.name} is a causal language model ({names}): it does generate and chat, not embed",
                field="model",
            )
        if folder.classifier:
            raise InvalidModel(f"{model.name} is a classifier ({names}): it does classify and score", field="model")
        return
    if known and not folder.classifier:
        raise InvalidModel(
            f"{model.name} has no classification head ({names}): it cannot {task}"
            + ("" if model.autoregressive else "; it does embed"),
            field="model",
        )
    labels = folder.config.get("id2label") or {}
    if task is Task.SCORE:
        if len(labels) > 1:
            raise InvalidModel(
                f"task 'score' needs a model with one output; {model.name} has {len(labels)} labels: use 'classify'",
                field="model",
            )
        folder.score_activation()
    if task is Task.CLASSIFY and folder.config.get("problem_type") == "regression":
        raise InvalidModel(f"{model.name} is a regression model: it does score, not classify", field="model")


def takes_images(model: Model, options: OnnxOptions) -> bool:
    """Whether the model's rows are images: it has a recipe for them, and its graph takes them, if it can be read."""
    if not image.is_for_images(model):
        return False
    graph = choose_graph(model, options)
    if graph is None:
        return not (model.path and (model.path / "tokenizer.json").exists())
    signature = onnx_graph.of_file(graph)
    if signature is None:
        return not (graph.parent / "tokenizer.json").exists()
    return image_input(signature) is not None


def check_image(task: Task, model: Model, options: OnnxOptions, pooling: str = "auto") -> None:
    """Refuse an image task that the model cannot do. Raises :class:`~storage.errors.InvalidModel`, and
    :class:`~storage.errors.InvalidJob` for a pooling asked of a graph that pools by itself."""
    if task is Task.SCORE:
        raise InvalidModel(f"{model.name} takes images: it does embed and classify, not score", field="task")
    image.read(model)
    graph = choose_graph(model, options)
    if graph is None:
        raise InvalidModel(
            f"{model.path} holds no ONNX graph; a model of images needs one (export it, such as with torch.onnx)",
            field="model",
        )
    signature = onnx_graph.of_file(graph)
    if signature is not None:
        check_classes(task, _width(signature, image_head(task, signature)), options.labels)
        if task is Task.EMBED and pooling != "auto" and token_states(signature) is None:
            raise InvalidJob(POOLED, field="pooling")


def check_image_column(spec: JobSpec, schema: pa.Schema) -> tuple[str, ...]:
    """The image column. Raises :class:`~storage.errors.InvalidInput` when it is missing or holds no images."""
    assert spec.column is not None
    if spec.pair_column is not None:
        raise InvalidJob("the model takes one image a row", field="pair_column")
    column_type(schema, spec.column, "column")
    kind = schema.field(spec.column).type
    if not is_image(kind):
        raise InvalidInput(
            f"column {spec.column!r} is {kind}; images are binary (encoded), string (a URI) or struct<bytes, path>",
            field="column",
        )
    return (spec.column,)


def check_embedding(spec: JobSpec, *, unit_length: bool) -> None:
    """Refuse ``int8`` vectors of other lengths than 1. Raises :class:`~storage.errors.InvalidJob`."""
    if spec.embedding_type == "int8" and not unit_length:
        raise InvalidJob("int8 needs embeddings of unit length; set normalize (--normalize)", field="embedding_type")


def check_prompt(spec: JobSpec, folder: TextFolder) -> None:
    """Refuse a prompt that the model does not have, or that cannot be left out of the pooling.

    Raises :class:`~storage.errors.InvalidJob`.
    """
    if not folder.prompts.of(spec) or folder.include_prompt:
        return
    if spec.overlong == "split":
        raise InvalidJob(
            "the model leaves its prompt out of the pooling, and only the first piece of a text has one; "
            "use 'truncate', or an empty prefix",
            field="overlong",
        )


def check_no_prompt(spec: JobSpec, why: str) -> None:
    """Refuse every prompt. Raises :class:`~storage.errors.InvalidJob`."""
    for name in ("prompt_name", "prefix"):
        if getattr(spec, name) is not None:
            raise InvalidJob(why, field=name)


def check_text_columns(spec: JobSpec, schema: pa.Schema) -> tuple[str, ...]:
    """The text columns. Raises :class:`~storage.errors.InvalidInput` when one is missing or holds no text."""
    names = []
    for role, name in (("column", spec.column), ("pair_column", spec.pair_column)):
        if name is None:
            continue
        kind = column_type(schema, name, role)
        if not is_text(kind):
            raise InvalidInput(f"column {name!r} is {kind}; text must be string or binary", field=role)
        names.append(name)
    return tuple(dict.fromkeys(names))


def check_tensor(spec: JobSpec, model: Model, options: OnnxOptions) -> None:
    """Raise :class:`~storage.errors.InvalidJob` for inputs, masks and states that the graph does not have."""
    _check_sequence(spec, options)
    signature = signature_of(model, options)
    if signature is None:
        return
    mode = onnx_graph.row_mode(signature, options.row_mode)
    names = [value.name for value in signature.inputs]
    if unknown := sorted(set(spec.inputs or {}) - set(names)):
        raise InvalidJob(
            f"the graph has no input {', '.join(unknown)}; it has {', '.join(names) or 'none'}", field="inputs"
        )
    Masks(signature, options.masks).check(mode)
    CarriedState(signature, options.state).check(mode)
    if both := sorted(set(spec.inputs or {}) & set(options.state)):
        raise InvalidJob(f"{', '.join(both)} gets the state of the row before, and reads no column", field="inputs")


def _check_sequence(spec: JobSpec, options: OnnxOptions) -> None:
    if spec.sequence is not None and not options.state:
        raise InvalidJob(
            "only a graph with a state knows sequences; say what is carried on: "
            '--set state=\'{"INPUT": "OUTPUT"}\' (engine_options.state)',
            field="sequence",
        )
    if options.state and spec.sequence is None:
        raise InvalidJob(
            "say which rows are steps of one sequence: sequence (--sequence COLUMN)", field="engine_options.state"
        )


def check_tensor_columns(
    spec: JobSpec, options: OnnxOptions, signature: Signature, mode: RowMode, schema: pa.Schema
) -> tuple[str, ...]:
    """The columns that feed the graph, without masks that Rowmill makes.

    Raises :class:`~storage.errors.InvalidInput` when one is missing, holds no tensors, needs a lossy cast, or has a
    rank or fixed size that the graph does not take.
    """
    unmasked = made_here(spec, options, schema)
    columns = []
    for value in signature.inputs:
        if value.name in unmasked or value.name in options.state:
            continue
        name = column_of(spec, value.name)
        kind = column_type(schema, name, f"inputs.{value.name}")
        _fitting_type(value, mode, name, kind, _advice(signature, mode, value, kind))
        columns.append(name)
    columns += _sequence_column(spec, schema)
    return tuple(dict.fromkeys(columns))


def _sequence_column(spec: JobSpec, schema: pa.Schema) -> list[str]:
    if spec.sequence is None:
        return []
    check_type(spec.sequence, column_type(schema, spec.sequence, "sequence"))
    return [spec.sequence]


def check_any_columns(spec: JobSpec, schema: pa.Schema) -> tuple[str, ...]:
    """All columns, where only loading tells which the graph reads. Raises :class:`~storage.errors.InvalidInput` when
    one that the job names is missing."""
    _sequence_column(spec, schema)
    for name, column in (spec.inputs or {}).items():
        column_type(schema, column, f"inputs.{name}")
    return tuple(dict.fromkeys(schema.names))


def settled_mode(spec: JobSpec, options: OnnxOptions, signature: Signature, schema: pa.Schema) -> RowMode:
    """How rows map onto the graph, by the graph and by what the columns hold.

    A graph that is run whole by its signature alone is stacked when every column holds items of its input: one axis
    less, of fitting sizes. Whether rows may run together is proved while they run.
    """
    mode = onnx_graph.row_mode(signature, options.row_mode)
    if mode != "whole" or options.row_mode != "auto" or not signature.can_stack():
        return mode
    made = made_here(spec, options, schema)
    for value in signature.inputs:
        if value.name in made or value.name in options.state:
            continue
        at = schema.get_all_field_indices(column_of(spec, value.name))
        found = tensor_kind(schema.field(at[0]).type) if len(at) == 1 else None
        if found is None or found.dims is None or value.dims is None or not _fits(found.dims, value.dims[1:]):
            return mode
    return "stack"


def settled_options(spec: JobSpec, model: Model, schema: pa.Schema) -> Mapping[str, Any]:
    """The job's options, with the ``row_mode`` that its columns settle."""
    options = onnx_options.parse(spec.engine_options)
    signature = signature_of(model, options) if spec.task is Task.TENSOR else None
    if signature is None:
        return spec.engine_options
    mode = settled_mode(spec, options, signature, schema)
    if mode == onnx_graph.row_mode(signature, options.row_mode):
        return spec.engine_options
    return {**spec.engine_options, "row_mode": mode}


def _advice(signature: Signature, mode: RowMode, value: GraphValue, kind: pa.DataType) -> str:
    """What a row is taken for, where it does not fit, and how to say otherwise."""
    found = tensor_kind(kind)
    if mode == "stack" and found is not None and found.dims is not None and _fits(found.dims, value.dims or ()):
        return "; a row is one item along the graph's first axis: with engine_options.row_mode 'whole' it is all of it"
    if mode != "whole":
        return ""
    said = "; a row of the table is a whole input of this graph"
    if signature.can_stack():
        said += ", or one item along its first axis with engine_options.row_mode 'stack'"
    return said


def _fits(have: Sequence[int | None], want: Sequence[Dim]) -> bool:
    return len(have) == len(want) and all(
        not isinstance(size, int) or given is None or given == size for given, size in zip(have, want, strict=True)
    )


def _fitting_type(value: GraphValue, mode: RowMode, name: str, kind: pa.DataType, advice: str) -> None:
    where = f"inputs.{value.name}"
    if turned_around(kind):
        raise InvalidInput(
            f"column {name!r} is {kind}; writers do not agree on which way round such a permutation is meant. Write "
            "the array without one: call .copy() on it before from_numpy_ndarray",
            field=where,
        )
    found = tensor_kind(kind)
    if found is None:
        raise InvalidInput(f"column {name!r} is {kind}, which holds no tensors; the graph wants {value}", field=where)
    if not lossless(found.dtype, value.dtype):
        raise InvalidInput(
            f"column {name!r} is {kind}, which does not convert to {value} without loss; cast the column", field=where
        )
    dims = row_dims(value, mode)
    if dims is None or found.dims is None:
        return
    brought = found.dims[1:] if mode == "unit" and len(found.dims) == len(dims) + 1 else found.dims
    if not _fits(brought, dims):
        shape = ", ".join("?" if dim is None else str(dim) for dim in dims)
        raise InvalidInput(
            f"column {name!r} holds {found} per row; the graph's {value} wants [{shape}]{advice}", field=where
        )
