"""LoRA adapters as directories: where each one is, and a digest of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.models import digest as files
from storage.errors import InvalidJob

WEIGHTS = "adapter_model.safetensors"
_FILES = ("adapter_config.json", WEIGHTS)


def directory(name: str, folder: str) -> Path:
    """The directory of an adapter, made absolute. Raises :class:`InvalidJob` for a home directory of no user."""
    try:
        return Path(folder).expanduser().resolve()
    except RuntimeError:
        raise InvalidJob(f"{folder}: there is no such user, or no such home", field=f"adapters.{name}") from None


def digests(adapters: Mapping[str, str], cache_dir: Path) -> dict[str, str]:
    """SHA-256 (hex) of the files of each adapter, by its name. ``adapters``: name → directory.

    Raises :class:`InvalidJob` for an adapter whose files cannot be read.
    """
    return {name: digest(name, directory(name, folder), cache_dir) for name, folder in adapters.items()}


def digest(name: str, folder: Path, cache_dir: Path) -> str:
    """SHA-256 (hex) of one adapter's files. Raises :class:`InvalidJob` when they cannot be read."""
    try:
        return files.digest({file: folder / file for file in _FILES}, cache_dir)
    except OSError as error:
        raise InvalidJob(f"{error.filename} cannot be read: {error.strerror}", field=f"adapters.{name}") from error
