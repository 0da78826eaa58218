"""The JSON files of a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.spec import json_text
from storage.errors import InvalidModel


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file. Raises :class:`~storage.errors.InvalidModel`."""
    try:
        value = json_text.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} holds no JSON object")
    return value
