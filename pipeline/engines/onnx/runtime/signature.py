"""The signature of an ONNX graph: names, element types and dimensions of its inputs and outputs."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.engines.onnx.runtime import low_precision
from storage.errors import InvalidModel

Dim = int | str | None
"""A fixed size, the name of a dynamic one, or ``None`` for a dynamic one without a name."""

READ_LIMIT = 512 * 2**20
"""Largest file that is parsed before the engine is loaded, in bytes: parsing takes a multiple of it in memory."""

_DTYPES: dict[str, npt.DTypeLike] = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "string": np.object_,
}


@dataclass(frozen=True, slots=True)
class GraphValue:
    """One input or output. ``dtype`` is ``object`` for strings; ``dims`` is ``None`` when even the rank is open."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[Dim, ...] | None

    @property
    def stackable(self) -> bool:
        """True when the first axis is dynamic."""
        return bool(self.dims) and not isinstance(self.dims[0], int)  # type: ignore[index]

    @property
    def unit_batch(self) -> bool:
        """True when the first axis has the fixed size one."""
        return bool(self.dims) and self.dims[0] == 1  # type: ignore[index]

    @property
    def fixed_batch(self) -> int | None:
        """The size of the first axis, where it is fixed."""
        first = self.dims[0] if self.dims else None
        return first if isinstance(first, int) else None

    def __str__(self) -> str:
        kind = "string" if self.dtype == np.object_ else self.dtype.name
        shape = "…" if self.dims is None else ", ".join("?" if dim is None else str(dim) for dim in self.dims)
        return f"{self.name}: {kind}[{shape}]"


@dataclass(frozen=True, slots=True)
class Signature:
    inputs: tuple[GraphValue, ...]
    outputs: tuple[GraphValue, ...]

    def loose_names(self) -> frozenset[str]:
        """Names that one input or output gives to several of its axes: such a name stands for no one size."""
        shapes = [value.dims or () for value in (*self.inputs, *self.outputs)]
        return frozenset(dim for dims in shapes for dim in dims if isinstance(dim, str) and dims.count(dim) > 1)

    def can_stack(self) -> bool:
        """Whether rows may be items along the first axis of every input and output, as far as the shapes tell."""
        dynamic = all(value.stackable for value in self.inputs)
        dynamic = dynamic and all(value.stackable or value.dims is None for value in self.outputs)
        return bool(self.inputs) and (dynamic or fixed_batch(self) is not None)

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.inputs))}) -> ({', '.join(map(str, self.outputs))})"


def of_session(session: Any, path: Path) -> Signature:
    """The signature as ONNX Runtime sees it, its own shape inference included.

    Raises :class:`~storage.errors.InvalidModel` for inputs or outputs that are not tensors of a supported type.
    """
    values = [*session.get_inputs(), *session.get_outputs()]
    # ONNX Runtime shows an open rank as an empty shape, like a scalar's; only the file tells them apart.
    scalars = {value.name for value in values if not value.shape}
    open_rank = _open_rank(path) & scalars if scalars else set()

    def one(value: Any, what: str) -> GraphValue:
        if not value.type.startswith("tensor("):
            raise InvalidModel(f"{path}: {what} {value.name!r} is a {value.type}; only tensors are supported")
        dims = None if value.name in open_rank else tuple(_dim(dim) for dim in value.shape)
        return GraphValue(value.name, _dtype(value.type[len("tensor(") : -1], value.name, path), dims)

    return Signature(
        tuple(one(value, "input") for value in session.get_inputs()),
        tuple(one(value, "output") for value in session.get_outputs()),
    )


def of_file(path: Path) -> Signature | None:
    """The signature as the file declares it, without loading weights kept beside it.

    ``None`` when it cannot be told cheaply: the package ``onnx`` is not installed, or the file exceeds ``READ_LIMIT``.
    Raises :class:`~storage.errors.InvalidModel` for a file that is not ONNX, and as :func:`of_session`.
    """
    stat = path.stat()
    return _of_content(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@functools.lru_cache(maxsize=8)
def _of_content(path: Path, content: tuple[int, ...]) -> Signature | None:
    """Several checks ask for it at submit, and a file may take a second to parse. ``content`` changes with it."""
    graph = _parse(path)
    if graph is None:
        return None
    weights = {tensor.name for tensor in graph.initializer}

    def one(value: Any, what: str) -> GraphValue:
        import onnx

        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            raise InvalidModel(f"{path}: {what} {value.name!r} is a {kind or 'value without a type'}, not a tensor")
        tensor = value.type.tensor_type
        name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        dims = None
        if tensor.HasField("shape"):
            dims = tuple(_dim(getattr(dim, dim.WhichOneof("value") or "", None)) for dim in tensor.shape.dim)
        return GraphValue(value.name, _dtype(name, value.name, path), dims)

    return Signature(
        tuple(one(value, "input") for value in graph.input if value.name not in weights),
        tuple(one(value, "output") for value in graph.output),
    )


def index_limits(path: Path) -> dict[str, int]:
    """Graph inputs that index a table kept in the graph (token ids, mostly) → the number of its rows.

    ONNX Runtime refuses a whole batch for one index outside it on a CPU, and reads garbage on a GPU. Seen are
    ``Gather`` nodes over an initializer whose indices are an input, cast or not.
    """
    graph = _parse(path)
    if graph is None:
        return {}
    tables = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    inputs = {value.name: value.name for value in graph.input if value.name not in tables}
    for node in graph.node:  # in topological order, so a cast comes before its use
        if node.op_type in ("Cast", "Identity") and not node.domain and node.input[0] in inputs:
            inputs[node.output[0]] = inputs[node.input[0]]
    limits: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "Gather" and not node.domain and node.input[0] in tables and node.input[1] in inputs:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            name, size = inputs[node.input[1]], tables[node.input[0]][axis]
            limits[name] = min(size, limits.get(name, size))
    return limits


def _parse(path: Path) -> Any | None:
    if importlib.util.find_spec("onnx") is None or path.stat().st_size > READ_LIMIT:
        return None
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(str(path), load_external_data=False).graph
    except (DecodeError, OSError, ValueError) as error:
        raise InvalidModel(f"{path} is not a readable ONNX file: {error}") from error


def _open_rank(path: Path) -> set[str]:
    graph = _parse(path)
    if graph is None:
        return set()
    return {v.name for v in [*graph.input, *graph.output] if not v.type.tensor_type.HasField("shape")}


def _dim(dim: object) -> Dim:
    if isinstance(dim, int) and dim >= 0:
        return dim
    # Exporters write "?" (Paddle), "-1" or "None" for an axis that they do not name: several of them need not be equal.
    named = isinstance(dim, str) and any(map(str.isalpha, dim)) and dim.lower() not in _NO_NAMES
    return str(dim) if named else None


_NO_NAMES = frozenset({"none", "unk", "unknown", "dynamic"})


def _dtype(name: str, value: str, path: Path) -> np.dtype[Any]:
    if name in _DTYPES:
        return np.dtype(_DTYPES[name])
    found = low_precision.dtype_of(name)
    if found is None:
        raise InvalidModel(f"{path}: {value!r} has element type {name}, which no Arrow column can carry")
    return found


RowMode = Literal["stack", "unit", "whole"]
"""What a row is: an item along the first axis of every input and output, run stacked; such an item, run alone because
the axis has the fixed size one; or the whole input."""


def fixed_batch(signature: Signature) -> int | None:
    """The one size above one that the first axis of every input and output has; ``None`` for any other graph."""
    sizes = {value.fixed_batch for value in [*signature.inputs, *signature.outputs]}
    size = sizes.pop() if len(sizes) == 1 and signature.inputs else None
    return size if size is not None and size > 1 else None


def row_mode(signature: Signature, wanted: Literal["auto", "stack", "whole"]) -> RowMode:
    """How rows map onto the graph.

    Rows are stacked when every input and output has a dynamic first axis, with the same name where it has one; an
    output with another name for it may have another number of items. With ``stack`` the names do not matter, and the
    first axis may have one fixed size, which is then the size of every batch; without it such a graph is taken for one
    whose input has several lines. What the columns hold may decide (see
    :func:`pipeline.engines.onnx.checks.settled_mode`). Raises
    :class:`~storage.errors.InvalidModel` when stacking was asked for and the graph cannot do it.
    """
    values: Sequence[GraphValue] = [*signature.inputs, *signature.outputs]
    if wanted == "whole" or not signature.inputs:
        return "whole"
    names = {value.dims[0] for value in signature.inputs if value.dims}
    if all(value.stackable for value in values) and len(names) == 1:
        others = {value.dims[0] for value in signature.outputs if value.dims} - names - {None}
        return "whole" if wanted == "auto" and others and names != {None} else "stack"
    if wanted == "stack":
        if signature.can_stack():
            return "stack"
        raise InvalidModel(
            f"row_mode 'stack' needs a first axis in every input and output, dynamic or of one size; the graph is "
            f"{signature}"
        )
    if all(value.unit_batch for value in signature.inputs) and all(
        v.unit_batch or v.stackable for v in signature.outputs
    ):
        return "unit"
    return "whole"
