"""Element types that neither numpy nor Arrow has: bfloat16, the 8-bit and 4-bit floats, 4-bit and 2-bit integers.

A column carries them in the next wider type that holds each of their values exactly (``CARRIERS``). Their numpy types
come from the package ``ml_dtypes``, which ``onnx`` brings. ONNX Runtime's binding takes and gives them by address only;
it keeps types below eight bits packed, the first element in the lowest bits, and strings need a detour.
"""

from __future__ import annotations

import ctypes
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

_CODES = {
    "bfloat16": 16,
    "float8e4m3fn": 17,
    "float8e4m3fnuz": 18,
    "float8e5m2": 19,
    "float8e5m2fnuz": 20,
    "uint4": 21,
    "int4": 22,
    "float4e2m1": 23,
    "float8e8m0": 24,
    "uint2": 25,
    "int2": 26,
}
"""``onnx.TensorProto.DataType``."""

_BITS = {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "uint2": 2}
_IN_ML_DTYPES = {
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
    "float8e8m0": "float8_e8m0fnu",
    "float4e2m1": "float4_e2m1fn",
}


def dtype_of(name: str) -> np.dtype[Any] | None:
    """The numpy type of one of these element types; ``None`` for other names, and where ``ml_dtypes`` is missing."""
    if name not in CARRIERS:
        return None
    try:
        import ml_dtypes
    except ImportError:
        return None
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _IN_ML_DTYPES.get(name, name)))
    return dtype


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
    kind = _names()[array.dtype]
    packed = pack(array, _BITS.get(kind, 8))
    binding._numpy_obj_references[name] = packed  # as bind_cpu_input does: bind_input keeps no reference
    binding.bind_input(name, "cpu", 0, _CODES[kind], array.shape, packed.ctypes.data)


def array_of(value: Any) -> Array:
    """The array of an ``OrtValue`` on the host: numpy's own types as the runtime hands them over, others as a copy."""
    kind = str(value.data_type()).removeprefix("tensor(").removesuffix(")")
    dtype = dtype_of(kind)
    if dtype is None:
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    bits = _BITS.get(kind, 8 * dtype.itemsize)
    data = ctypes.string_at(value.data_ptr(), (count * bits + 7) // 8) if count else b""
    raw = np.frombuffer(data, np.uint8)
    if bits < 8:
        raw = unpack(raw, count, bits, signed=kind.startswith("int"))
    return raw.view(dtype).reshape(shape)


def pack(array: Array, bits: int) -> Array:
    """Elements of ``bits`` bits, one in each byte, as the runtime keeps them: uint8 [ceil(n * bits / 8)]."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if bits == 8 or array.dtype.itemsize > 1:
        return raw
    per_byte = 8 // bits
    padded = np.zeros(-(-len(raw) // per_byte) * per_byte, np.uint8)
    padded[: len(raw)] = raw & np.uint8((1 << bits) - 1)
    lanes = padded.reshape(-1, per_byte)
    packed = np.zeros(len(lanes), np.uint8)
    for lane in range(per_byte):
        packed |= lanes[:, lane] << np.uint8(lane * bits)
    return packed


def unpack(raw: Array, count: int, bits: int, *, signed: bool) -> Array:
    """The ``count`` elements of packed bytes, uint8 [count]; ``signed``: with the sign spread over the byte."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = ((raw[:, None] >> shifts[None, :]) & np.uint8((1 << bits) - 1)).reshape(-1)[:count]
    if signed:
        sign = np.uint8(1 << (bits - 1))
        values = (values ^ sign) - sign  # wraps around in eight bits
    return np.ascontiguousarray(values)
