"""In which numbers a model computes: 32-bit floats, 16-bit floats, or integers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Literal

from pipeline.models.model import Model

Precision = Literal["float32", "16-bit", "quantized"]

_QUANTIZED_OPS = frozenset({"MatMulInteger", "ConvInteger", "QuantizeLinear", "DynamicQuantizeLinear", "MatMulNBits"})
_SIXTEEN = frozenset({"F16", "BF16"})
_EIGHT = frozenset({"I8", "U8", "F8_E4M3", "F8_E5M2"})
_MOST_HEADER = 100 * 2**20


def of(model: Model) -> Precision:
    """The lowest precision of the weights that are run: the best graph's, or else the checkpoint's."""
    if model.onnx_files:
        return _of_graph(model.onnx_files[0])
    kinds: set[str] = set()
    for path in model.weights:
        if path.suffix == ".safetensors":
            kinds |= _kinds(path)
    if kinds & _EIGHT:
        return "quantized"
    return "16-bit" if kinds & _SIXTEEN else "float32"


def _of_graph(path: Path) -> Precision:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        if node.op_type in _QUANTIZED_OPS or node.op_type.startswith(("QLinear", "QGemm", "DynamicQuantize")):
            return "quantized"
    sixteen = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return "16-bit" if any(tensor.data_type in sixteen for tensor in model.graph.initializer) else "float32"


def _kinds(path: Path) -> set[str]:
    """The types of a safetensors file's tensors, from its header."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _MOST_HEADER:
            return set()
        header = json.loads(file.read(size))
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
