"""Element types that neither numpy nor Arrow has: bfloat16, the 8-bit and 4-bit floats, 4-bit and 2-bit integers.

A column carries them in the next wider type that holds each of their values exactly (``CARRIERS``). Their numpy types
come from ``ml_dtypes``. ONNX Runtime's binding takes and gives them by address only; ``onnx`` packs and unpacks those
below eight bits. Strings beside them need a detour.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CARRIERS: dict[str, npt.DTypeLike] = {
    "bfloat16": np.float32,
    "float8e4m3fn": np.float32,
    "float8e4m3fnuz": np.float32,
    "float8e5m2": np.float32,
    "float8e5m2fnuz": np.float32,
    "float8e8m0": np.float32,
    "float4e2m1": np.float32,
    "int4": np.int8,
    "uint4": np.uint8,
    "int2": np.int8,
    "uint2": np.uint8,
}
"""Element type as ONNX Runtime spells it → numpy type of the column."""


def dtype_of(name: str) -> np.dtype[Any] | None:
    """The numpy type of one of these element types; ``None`` for other names, and where ``onnx`` is missing."""
    if name not in CARRIERS:
        return None
    try:
        from onnx import TensorProto, helper
    except ImportError:
        return None
    return helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(name.upper()))


@cache
def _names() -> dict[np.dtype[Any], str]:
    found = {name: dtype_of(name) for name in CARRIERS}
    return {dtype: name for name, dtype in found.items() if dtype is not None}


def is_low_precision(dtype: np.dtype[Any]) -> bool:
    """True for the types of this module. Numpy's own types are recognised without an import."""
    return dtype.isbuiltin != 1 and dtype in _names()


def carrier(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of the column that holds such elements: other types hold their own."""
    return np.dtype(CARRIERS[_names()[dtype]]) if is_low_precision(dtype) else dtype


def is_float(dtype: np.dtype[Any]) -> bool:
    """True for every type with a fraction or an exponent, these included."""
    return carrier(dtype).kind == "f"


def finite(array: Array) -> npt.NDArray[np.bool_]:
    """Which elements are finite numbers, element by element; all, of types other than floats."""
    if not is_float(array.dtype):
        return np.ones(array.shape, np.bool_)
    return np.asarray(np.isfinite(array.astype(carrier(array.dtype), copy=False)))


def is_low_precision_type(name: str) -> bool:
    """Whether ONNX Runtime's name of a value's type, such as ``tensor(bfloat16)``, is one of this module's."""
    return name.removeprefix("tensor(").removesuffix(")") in CARRIERS


def strings(array: Array) -> Any:
    """An ``OrtValue`` of strings. The binding makes none from numpy: this one is the constant of a small graph."""
    import onnxruntime
    from onnx import TensorProto, helper

    constant = helper.make_tensor("s", TensorProto.STRING, array.shape, [text.encode() for text in array.reshape(-1)])
    output = helper.make_tensor_value_info("t", TensorProto.STRING, array.shape)
    graph = helper.make_graph([helper.make_node("Identity", ["s"], ["t"])], "strings", [], [output], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_output("t", "cpu")
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0]


def bind(binding: Any, name: str, array: Array) -> None:
    """Bind a host array as the input ``name`` of an ``IOBinding``; the binding keeps the memory alive."""
    if array.dtype == np.object_:
        binding.bind_ortvalue_input(name, strings(array))
        return
    if not is_low_precision(array.dtype):
        binding.bind_cpu_input(name, array)
        return
    from onnx import numpy_helper

    tensor = numpy_helper.from_array(array)
    packed = np.frombuffer(tensor.raw_data, np.uint8)
    binding._numpy_obj_references[name] = packed  # as bind_cpu_input does: bind_input keeps no reference
    binding.bind_input(name, "cpu", 0, tensor.data_type, array.shape, packed.ctypes.data)


def array_of(value: Any) -> Array:
    """The array of an ``OrtValue`` on the host: numpy's own types as the runtime hands them over, others as a copy."""
    kind = str(value.data_type()).removeprefix("tensor(").removesuffix(")")
    dtype = dtype_of(kind)
    if dtype is None:
        return np.asarray(value.numpy())
    import ml_dtypes
    from onnx import TensorProto, numpy_helper

    shape = value.shape()
    limits: Any = ml_dtypes.finfo if CARRIERS[kind] is np.float32 else ml_dtypes.iinfo
    n_bytes = (math.prod(shape) * limits(dtype).bits + 7) // 8
    data = ctypes.string_at(value.data_ptr(), n_bytes) if n_bytes else b""
    tensor = TensorProto(data_type=TensorProto.DataType.Value(kind.upper()), dims=shape, raw_data=data)
    return np.asarray(numpy_helper.to_array(tensor))
