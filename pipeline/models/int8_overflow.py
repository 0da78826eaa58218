"""Whether ONNX Runtime multiplies 8-bit numbers exactly on this processor, and how to ask for it where it does not.

x86-64 processors without VNNI keep the sum of two products of an unsigned and a signed 8-bit number in 16 bits,
clipped: an error of 1.7 where rounding alone gives 0.1 (measured), and nothing says so. Asked to be exact, ONNX Runtime
makes constant weights unsigned when it optimizes a graph. It does so on every processor, and where there is VNNI a
quantized all-MiniLM-L6-v2 then takes 1.6 times as long for the same bits (measured). So it is asked only where it must.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

PRECISE = "session.x64quantprecision"
PRODUCT = base64.b64decode(
    "CAgSADpmChgKAXgKAXcSAXkiDU1hdE11bEludGVnZXISBWVpZ2h0WhUKAXgSEAoOCAISCgoDEgFtCgMSAWtaFQoBdxIQCg4IAxIK"
    "CgMSAWsKAxIBbmIVCgF5EhAKDggGEgoKAxIBbQoDEgFuQgQKABAN"
)
"""An ONNX model, opset 13: the matrix product of uint8 [m, k] and int8 [k, n] as int32 [m, n]. Bytes, so that the
``onnx`` package is not needed."""


@functools.cache
def overflows(runtime: Any) -> bool:
    """Whether products come out too small here: tried, with the largest numbers there are."""
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = runtime.InferenceSession(PRODUCT, settings, providers=["CPUExecutionProvider"])
    left, right = np.full((16, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
    (found,) = session.run(None, {"x": left, "w": right})
    return bool((found != 64 * 255 * 127).any())


def session_config(runtime: Any) -> Mapping[str, str]:
    """What sessions that may hold a quantized graph are configured with here."""
    return {PRECISE: "1"} if overflows(runtime) else {}
