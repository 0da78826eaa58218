"""Result columns of embed and classify, for texts and images alike: what is kept of the model's numbers, and how."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.engines.pooling import unit_length
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidJob

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

NOT_FINITE = (RowErrorCode.NOT_FINITE, "the model's result for this row holds a NaN or an infinity")
"""The row error, code and message, where :func:`finite` is false."""


def finite(numbers: Floats) -> npt.NDArray[np.bool_]:
    """Bool [n]: which rows of [n, d] hold numbers only. A NaN stored as int8 or as its sign would look like one."""
    return np.asarray(np.isfinite(numbers).all(axis=1))


def kept_width(spec: JobSpec, width: int) -> int:
    """How many of a vector's ``width`` numbers the job keeps. Raises :class:`~storage.errors.InvalidJob` for more."""
    if spec.dimensions is not None and spec.dimensions > width:
        raise InvalidJob(f"{spec.dimensions} of {width}: the model's embeddings are shorter", field="dimensions")
    return spec.dimensions or width


def embedding_type(spec: JobSpec, width: int) -> pa.DataType:
    """The type of the column ``embedding`` for vectors of ``width`` numbers."""
    kept = kept_width(spec, width)
    match spec.embedding_type:
        case "int8":
            return pa.list_(pa.int8(), kept)
        case "binary":
            return pa.list_(pa.uint8(), -(-kept // 8))
        case _:
            return pa.list_(pa.float32(), kept)


def finished(spec: JobSpec, vectors: Floats, *, normalize: bool) -> Array:
    """Embeddings as they are stored, [n, d], from the model's, float32 [n, width].

    Shortened first (Matryoshka representation learning, arXiv 2205.13147: the first numbers of a vector are a vector),
    then of unit length where asked. ``int8`` is ``round(127 x)`` and needs unit length, so that nothing is cut off and
    a row's bytes depend on no other row; ``binary`` keeps the signs, eight to a byte, the first in the highest bit.
    Raises :class:`~storage.errors.InvalidJob` for ``int8`` of vectors of other lengths.
    """
    vectors = vectors[:, : kept_width(spec, vectors.shape[1])]
    if spec.embedding_type == "binary":
        return np.packbits(vectors > 0, axis=1)
    if normalize:
        vectors = unit_length(vectors)
    if spec.embedding_type != "int8":
        return vectors
    if not normalize:
        raise InvalidJob("int8 needs embeddings of unit length; set normalize", field="embedding_type")
    return np.asarray(np.rint(vectors * np.float32(127)), np.int8)


def embedding_column(stored: Array) -> Any:
    """Embeddings from :func:`finished` as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(stored).reshape(-1)), stored.shape[1])


def classify_fields() -> list[pa.Field[Any]]:
    """Result columns of ``classify``."""
    scores = pa.list_(pa.struct([pa.field("label", pa.string()), pa.field("score", pa.float32())]))
    return [pa.field("label", pa.string()), pa.field("score", pa.float32()), pa.field("scores", scores)]


def classify_columns(spec: JobSpec, p: Floats, labels: pa.StringArray) -> dict[str, Any]:
    """``label``, ``score`` and ``scores`` from probabilities, float32 [n, k].

    Best first, all labels or ``top_k`` of them; of equal ones that which is the model's first.
    """
    n = len(p)
    order = np.argsort(-p, axis=1, kind="stable")[:, : spec.top_k]
    best = p.argmax(axis=1)
    pairs = pa.StructArray.from_arrays(
        [labels.take(pa.array(order.reshape(-1), pa.int64())), pa.array(np.take_along_axis(p, order, 1).reshape(-1))],
        ["label", "score"],
    )
    offsets = pa.array(np.arange(n + 1) * order.shape[1], pa.int32())
    return {
        "label": labels.take(pa.array(best, pa.int64())),
        "score": pa.array(p[np.arange(n), best]),
        "scores": pa.ListArray.from_arrays(offsets, pairs),
    }
