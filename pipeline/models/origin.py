"""Where a directory of a model was made from: its checkpoint, and the rows that calibrated it.

It stands in a hidden file, which is no part of the model's digest: the same content has the same digest wherever it
was made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.models.model import Model
from pipeline.models.resolve import resolve
from storage.errors import InvalidModel

FILE = ".rowmill-origin.json"


@dataclass(frozen=True, slots=True)
class Origin:
    """``checkpoint`` is a path with PyTorch weights, ``digest`` its content; ``calibration``: hashes of rows."""

    checkpoint: str | None = None
    digest: str | None = None
    calibration: frozenset[str] = frozenset()


def of(model: Model) -> Origin:
    """What is known of a model's origin; one with PyTorch weights is its own."""
    if model.path is None:
        return Origin()
    kept = _read((model.path if model.path.is_dir() else model.path.parent) / FILE)
    if model.weights:
        return Origin(str(model.path), model.digest, kept.calibration)
    return kept


def write(folder: Path, made_from: Model, calibration: Iterable[str] = ()) -> None:
    """Leave in ``folder`` what it was made from, and the hashes (:func:`row_hash`) of the rows that calibrated it."""
    before = of(made_from)
    rows = sorted(before.calibration | set(calibration))
    content = {"checkpoint": before.checkpoint, "digest": before.digest, "calibration": rows}
    (folder / FILE).write_text(json.dumps(content))


def original(model: Model, cache_dir: Path) -> Model | None:
    """The checkpoint that a model was made from, where it is still there and still the same."""
    found = of(model)
    if found.checkpoint is None:
        return None
    try:
        checkpoint = resolve(found.checkpoint, cache_dir)
    except InvalidModel:
        return None
    return checkpoint if checkpoint.digest == found.digest and checkpoint.weights else None


def row_hash(row: Any) -> str:
    """The same for rows with the same values, whatever their type."""
    return hashlib.sha256(json.dumps(row, default=str, sort_keys=True).encode()).hexdigest()[:24]


def _read(path: Path) -> Origin:
    try:
        content = json.loads(path.read_bytes())
        return Origin(content["checkpoint"], content["digest"], frozenset(content["calibration"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Origin()  # made by hand, or by an earlier version
