"""The files of a revision: which they are, and whether they are still what was registered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.models.digest import combined, file_hashes
from pipeline.models.model import Model
from storage.errors import InvalidModel
from storage.registry.records import Artifact


def base_of(path: Path) -> Path:
    """The folder that artifacts are found from: the model's own, or that of its graph."""
    return path.parent if path.suffix == ".onnx" and not path.is_dir() else path


def artifacts_of(model: Model, cache_dir: Path) -> list[Artifact]:
    """The files that the model's digest covers, with their hashes. Raises :class:`InvalidModel` when one changes."""
    if model.path is None:
        return []
    base = base_of(model.path)
    hashes = file_hashes(model.content, cache_dir)
    if combined(hashes) != model.digest:
        raise InvalidModel(f"{model.path} changed while it was read; try again", field="model")
    return [
        Artifact(name, os.path.relpath(path, base), path.stat().st_size, hashes[name])
        for name, path in sorted(model.content.items())
    ]


def verify(reference: str, path: Path, artifacts: Sequence[Artifact], cache_dir: Path) -> None:
    """Raise :class:`InvalidModel`, naming the file, where one is missing or has another content than was registered.

    Nothing is parsed before: a file that was changed says nothing about the others.
    """
    base = base_of(path)
    places = {item.name: Path(os.path.normpath(base / item.at)) for item in artifacts}
    for name, place in places.items():
        if not place.is_file():
            raise InvalidModel(f"{place} ({name!r} of {reference}) is missing: {_remedy(reference)}", field="model")
    hashes = file_hashes(places, cache_dir)
    for item in artifacts:
        if hashes[item.name] != item.sha256:
            raise InvalidModel(
                f"{places[item.name]} ({item.name!r} of {reference}) is not the file that was registered: its SHA-256 "
                f"is {hashes[item.name][:12]}… in place of {item.sha256[:12]}…; {_remedy(reference)}",
                field="model",
            )


def refuse_others(reference: str, model: Model, digest: str, artifacts: Sequence[Artifact]) -> None:
    """Raise :class:`InvalidModel`, naming the files, where the model has some that were not registered."""
    if model.digest == digest:
        return
    more = sorted(set(model.content) - {item.name for item in artifacts})
    what = f"has files that were not registered: {', '.join(more)}" if more else "is not what was registered"
    raise InvalidModel(f"{model.path} {what}; {_remedy(reference)}", field="model")


def _remedy(reference: str) -> str:
    name = reference.partition("@")[0]
    return f"restore what was registered, or register this as a new revision ('rowmill model add {name} PATH')"
