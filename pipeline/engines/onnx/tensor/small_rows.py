"""Graphs whose rows cost so little that handing them over is what takes the time. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.engines.onnx.runtime.signature import Dim, RowMode, Signature

ROWS = 8192
"""Rows of such a graph in a batch: 256 take longer to be handed over than to be computed."""
READ_ROWS = 65_536
"""Rows of them that are read at a time."""
_ROW_BYTES = 4096
_WEIGHT_BYTES = 16 * 2**20


def are_small(signature: Signature, mode: RowMode, weight_bytes: int) -> bool:
    """Whether each row is numbers and short vectors of fixed sizes, on the way in and out, through few weights.

    Such a row's intermediate values are few as well, so that a batch of ``ROWS`` stays small. Told by the graph alone:
    the same graph has the same batches on every machine.
    """
    values = (*signature.inputs, *signature.outputs)
    return (
        mode == "stack"
        and weight_bytes <= _WEIGHT_BYTES
        and all(value.dims is not None and _is_short(value.dims[1:], value.dtype) for value in values)
    )


def _is_short(dims: Sequence[Dim], dtype: np.dtype[np.generic]) -> bool:
    sizes = [dim for dim in dims if isinstance(dim, int)]
    fixed = len(sizes) == len(dims) <= 1 and dtype != np.object_
    return fixed and int(np.prod(sizes, dtype=np.int64)) * dtype.itemsize <= _ROW_BYTES
