"""Turning this process into another program of ours, with the settings that the flags gave."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pipeline.config.settings import LoadedSettings


def become(loaded: LoadedSettings, module: str, *arguments: str) -> NoReturn:
    """``python -m module arguments`` in place of this process: same id, same terminal, one process fewer.

    What came from flags goes into its environment: everybody on the machine can read a command line.
    """
    environment = {**os.environ, **_of_flags(loaded)}
    for name in _of_flags(loaded):
        for nested in [key for key in environment if key.startswith(f"{name}__")]:
            del environment[nested]  # it would win over the whole value, in which it is merged already
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)  # noqa: S606


def _of_flags(loaded: LoadedSettings) -> dict[str, str]:
    values = loaded.settings.model_dump(mode="json")
    given = {origin.name.partition(".")[0] for origin in loaded.origins if origin.kind == "flag"}
    return {
        f"ROWMILL_{name.upper()}": values[name] if isinstance(values[name], str) else json.dumps(values[name])
        for name in sorted(given)
        if values[name] is not None
    }
