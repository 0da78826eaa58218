"""Whether 8-bit products are clipped here, as it is tried."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pipeline.models.int8_overflow import PRODUCT, overflows


def test_the_graph_is_a_product_of_8_bit_numbers() -> None:
    random = np.random.default_rng(0)
    left = random.integers(0, 64, (5, 33), np.uint8)  # small enough for every processor
    right = random.integers(-64, 64, (33, 7), np.int8)
    session = onnxruntime.InferenceSession(PRODUCT, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": left, "w": right})
    assert np.array_equal(found, left.astype(np.int32) @ right.astype(np.int32))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="what overflows are x86-64's instructions")
def test_clipped_where_there_is_no_vnni() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    assert overflows(onnxruntime) == (not flags & {"avx512_vnni", "avx_vnni"})
