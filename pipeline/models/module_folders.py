"""``modules.json`` of a sentence-transformers folder: which modules there are, and in which directories."""

from __future__ import annotations

from pathlib import Path

from pipeline.spec import json_text
from storage.errors import InvalidModel

LAYER_WEIGHTS = "model.safetensors"
"""The weights of a module, in its directory."""


def read(root: Path) -> list[tuple[str, Path]] | None:
    """Type and directory of each module in order; ``None`` without ``modules.json``.

    Raises :class:`~storage.errors.InvalidModel` for a damaged file, and for a directory outside the model's.
    """
    path = root / "modules.json"
    try:
        entries = json_text.loads(path.read_bytes())
        modules = []
        for entry in sorted(entries, key=lambda item: int(item["idx"])):
            folder = root / entry["path"]
            if not folder.resolve().is_relative_to(root.resolve()):
                raise InvalidModel(f"{path} names {entry['path']!r}, which lies outside the model directory")
            modules.append((str(entry["type"]), folder))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidModel(f"{path} cannot be read: {error!r}") from error
    return modules


def layers(root: Path) -> list[Path]:
    """The directories of the modules after the Transformer that have one of their own."""
    found = [folder for kind, folder in read(root) or () if kind.rsplit(".", 1)[-1] != "Transformer"]
    return [folder for folder in found if folder.resolve() != root.resolve()]
