"""The node tests of the package ``onnx`` as rows: every case is a graph, and one row of tensors.

``load_model_tests`` builds them in memory (1,884 in version 1.23). Plain ONNX Runtime is the reference: what it
computes here, the pipeline must give bit by bit; what it refuses, the pipeline must refuse with an error of its own.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import TensorProto

from pipeline.engines.onnx.runtime import low_precision

Array = np.ndarray[Any, Any]
SHARE = int(os.environ.get("CONFORMANCE_SHARE", "6"))
"""One case in so many is run; 1 runs them all (``make conformance``)."""


@dataclass(frozen=True, slots=True)
class Case:
    """``inputs``: graph input → the case's tensor; ``None`` when some input or output is no tensor."""

    name: str
    model: onnx.ModelProto
    inputs: dict[str, Array] | None

    @property
    def outputs(self) -> list[str]:
        return [value.name for value in self.model.graph.output]

    def draw(self, of: int) -> int:
        """A number below ``of`` that is always the same for this case."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4]) % of


@cache
def all_cases() -> tuple[Case, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        return tuple(_case(case) for case in load_model_tests(kind="node"))


def cases() -> Iterator[Case]:
    """The cases of this run, chosen by a hash of their names."""
    return (case for case in all_cases() if case.draw(SHARE) == 0)


def _case(case: Any) -> Case:
    graph = case.model.graph
    values = [*graph.input, *graph.output]
    tensors = all(value.type.WhichOneof("value") == "tensor_type" for value in values)
    given = dict(zip((value.name for value in graph.input), case.data_sets[0][0], strict=False))
    inputs = {name: _array(tensor) for name, tensor in given.items()} if tensors else None
    return Case(case.name, case.model, inputs)


def _array(tensor: Any) -> Array:
    return onnx.numpy_helper.to_array(tensor) if isinstance(tensor, TensorProto) else np.asarray(tensor)


class Refused(Exception):
    """What plain ONNX Runtime says of a case that it does not run."""


def plain(case: Case) -> list[Array]:
    """The outputs of plain ONNX Runtime, with the settings that the engine makes. Raises :class:`Refused`."""
    assert case.inputs is not None
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.enable_mem_pattern = False
    try:
        session = onnxruntime.InferenceSession(
            case.model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )
        return plain_run(session, case.inputs)
    except Exception as error:  # its exceptions share no base
        raise Refused(f"{type(error).__name__}: {error}") from error


def plain_run(session: Any, inputs: dict[str, Array]) -> list[Array]:
    feed = {name: _object(array) for name, array in inputs.items()}
    names = {value.type for value in [*session.get_inputs(), *session.get_outputs()]}
    if not any(low_precision.dtype_of(name.removeprefix("tensor(").removesuffix(")")) for name in names):
        return [np.asarray(output) for output in session.run(None, feed)]
    binding = session.io_binding()
    for name, array in feed.items():
        low_precision.bind(binding, name, array)
    for value in session.get_outputs():
        binding.bind_output(value.name, "cpu")
    session.run_with_iobinding(binding)
    return [low_precision.array_of(value) for value in binding.get_outputs()]


def _object(array: Array) -> Array:
    return np.ascontiguousarray(array.astype(np.object_) if array.dtype.kind in "US" else array).reshape(array.shape)


KINDS = ("lists", "fixed", "struct")
"""The ways to store a tensor in a column."""


def column(rows: Array, how: str) -> Any:
    """n tensors of one shape, [n, *shape], as a column. What a way cannot store is stored as lists."""
    rows = rows.astype(low_precision.carrier(rows.dtype))
    shape = rows.shape[1:]
    flat = np.ascontiguousarray(rows).reshape(-1)
    leaf = pa.array(flat.tolist(), pa.string()) if flat.dtype.kind in "OUS" else pa.array(flat)
    size = int(np.prod(shape, dtype=np.int64))
    if not shape:
        return leaf
    if how == "fixed" and size and rows.dtype.kind in "iuf":
        storage = pa.FixedSizeListArray.from_arrays(leaf, size)
        return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(leaf.type, shape), storage)
    if how == "struct":
        sizes = pa.array(np.tile(np.asarray(shape, np.int32), len(rows)))
        parts = [_lists(sizes, len(rows), len(shape)), _lists(leaf, len(rows), size)]
        return pa.StructArray.from_arrays(parts, ["shape", "data"])
    for axis in range(len(shape) - 1, -1, -1):
        leaf = _lists(leaf, len(rows) * int(np.prod(shape[:axis], dtype=np.int64)), shape[axis])
    return leaf


def _lists(values: Any, n: int, size: int) -> Any:
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1) * size, pa.int32()), values)


def write(path: Path, inputs: dict[str, Array], how: str) -> pa.Table:
    """Rows of the inputs, [n, *shape] each, as a Parquet file; what is read back from it."""
    pq.write_table(pa.table({name: column(rows, how) for name, rows in inputs.items()}), path)
    return pq.read_table(path)


def same_bits(column: Any, row: int, expected: Array) -> bool:
    """Whether the row of an output column holds ``expected`` bit by bit, and is of its shape.

    An independent reading of the output format: only pyarrow is used. Lists of nothing say nothing of their inner
    sizes, and a row of a graph with a first axis of size one comes without it.
    """
    expected = expected.astype(low_precision.carrier(expected.dtype))
    one = column.slice(row, 1)
    shape: list[int] = []
    if isinstance(one.type, pa.FixedShapeTensorType):
        shape = list(one.type.shape)
        one = one.storage.flatten()
    elif pa.types.is_struct(one.type):
        shape = one.field("shape").flatten().to_pylist()
        one = one.field("data").flatten()
    if pa.types.is_fixed_size_list(one.type):
        shape = [one.type.list_size]
        one = one.flatten()
    while pa.types.is_list(one.type):
        lengths = set(one.value_lengths().to_pylist())
        if len(lengths) > 1:
            return False
        shape += lengths
        one = one.flatten()
    if expected.dtype.kind in "OUS":
        found = np.asarray(one.to_pylist(), np.object_)
        equal = found.tolist() == expected.reshape(-1).tolist()
    else:
        found = one.to_numpy(zero_copy_only=False)
        equal = found.dtype == expected.dtype and found.tobytes() == np.ascontiguousarray(expected).tobytes()
    wanted = [list(expected.shape), list(expected.shape[1:]) if expected.shape[:1] == (1,) else None]
    return equal and (not expected.size or shape in wanted)
