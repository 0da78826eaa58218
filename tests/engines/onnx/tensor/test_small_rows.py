"""Which graphs get thousands of rows in a batch: those whose rows are short vectors through few weights."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.engines.onnx.runtime.signature import Dim, GraphValue, Signature
from pipeline.engines.onnx.tensor.small_rows import are_small

FLOAT = np.dtype(np.float32)


def graph(
    row: tuple[Dim, ...] | None, out: tuple[Dim, ...] | None = (), dtype: np.dtype[np.generic] = FLOAT
) -> Signature:
    """One input and one output, with rows of these shapes."""
    shapes = {name: None if dims is None else ("n", *dims) for name, dims in (("x", row), ("y", out))}
    return Signature((GraphValue("x", dtype, shapes["x"]),), (GraphValue("y", FLOAT, shapes["y"]),))


def test_short_vectors_and_numbers_are() -> None:
    assert are_small(graph((20,), (8,)), "stack", 2**20)
    assert are_small(graph(()), "stack", 2**20)


@pytest.mark.parametrize(
    "signature",
    [
        graph((20, 20)),  # an image, a sequence of vectors: what is computed of it may be large
        graph(("length",)),
        graph(None),
        graph((20,), ("length",)),
        graph((2000,)),
        graph((20,), (2000,)),
        graph((3,), dtype=np.dtype(np.object_)),
    ],
    ids=str,
)
def test_others_are_not(signature: Signature) -> None:
    assert not are_small(signature, "stack", 2**20)


def test_nor_are_many_weights_and_whole_inputs() -> None:
    assert not are_small(graph((20,)), "stack", 2**26)
    assert not are_small(graph((20,)), "whole", 2**20)
