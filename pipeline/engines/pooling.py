"""Pure numpy: token states to sentence embeddings, logits to probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def pool(states: Floats, lengths: Ints, modes: Sequence[str], start: int = 0) -> Floats:
    """Sentence embeddings, float32 [n, len(modes) * d], from token states, float32 [n, s, d], padded on the right.

    ``lengths``: int64 [n], each at least 1; what lies behind a row's length is not looked at. Modes and their order of
    concatenation are those of sentence-transformers' ``Pooling``; the first ``start`` tokens (a prompt) are left out.
    Of a text without any other tokens, mean and last are zeros, and max is minus infinity, as there.
    """
    parts = [_one(states, lengths, mode, start) for mode in modes]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _one(states: Floats, lengths: Ints, mode: str, start: int) -> Floats:
    rows = np.arange(len(states))
    if mode == "cls":
        return np.asarray(states[rows, np.where(start < lengths, start, 0)])
    if mode == "last":
        return np.where((start < lengths)[:, None], states[rows, lengths - 1], np.float32(0))
    at = np.arange(states.shape[1])[None, :]
    mask = (at >= start) & (at < lengths[:, None])
    if mode == "max":
        return np.asarray(np.where(mask[:, :, None], states, np.float32(-np.inf)).max(axis=1))
    weights = mask.astype(np.float32)
    if mode == "weightedmean":  # by position, from one
        weights *= np.arange(1, states.shape[1] + 1, dtype=np.float32)
    # What padding holds may be infinite or NaN, and 0 * inf is NaN: blank it where a row is shorter than the batch.
    if not mask.all():
        states = np.where(mask[:, :, None], states, np.float32(0))
    total = np.matmul(weights[:, None, :], states)[:, 0]
    size = np.maximum(weights.sum(axis=1, keepdims=True), np.float32(1e-9))
    return np.asarray(total / (np.sqrt(size) if mode == "mean_sqrt_len" else size))


def unit_length(vectors: Floats) -> Floats:
    """Each row of [n, d] divided by its Euclidean norm; rows shorter than 1e-12 are divided by that (as in PyTorch).

    The norm is taken in float64: the squares of numbers past 1e19 overflow float32.
    """
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), np.float32)


def sigmoid(logits: Floats) -> Floats:
    """Elementwise, without overflow."""
    return (0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)


def softmax(logits: Floats) -> Floats:
    """Along the last axis, in float64, so that large logits do not overflow."""
    exp = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True), dtype=np.float32)
