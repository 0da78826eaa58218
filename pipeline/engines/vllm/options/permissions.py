"""Engine options of vLLM that run code, or reach beyond the job's own model: the operator's to allow, not a job's.

They import a class or a file by its name, unpickle weights, read or write files of their own, or open connections.
``options.toml`` says which they are, why, and which of their values are harmless.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.engines.base import Permissions
from pipeline.engines.vllm.options.engine_args import ENGINE

_JUDGED = {"harmless", "harmless_keys", "risky_word"}


def risk(name: str, value: Any) -> str | None:
    """Why this value of the option is the operator's to allow, or ``None``."""
    entry = ENGINE.entries.get(name, {})
    if "directory" in entry:
        return "it names a directory beside the model"
    if value in entry.get("harmless", ()) or entry.get("risky_word", "") not in str(value):
        return None
    if (keys := entry.get("harmless_keys")) is not None:
        if not isinstance(value, Mapping):
            return None if isinstance(value, int) else "it may name code or files"
        more = sorted(str(key) for key in value if key not in keys)
        return f"its {', '.join(more)} may name code or files" if more else None
    why: str | None = entry.get("operator")
    return why


def depends_on_value(name: str) -> bool:
    """Whether some values of the option are harmless and some are not."""
    return bool(_JUDGED & ENGINE.entries.get(name, {}).keys())


def check(options: Mapping[str, Any], permissions: Permissions) -> None:
    """Raise :class:`~storage.errors.InvalidJob` for an option that only the operator may allow, and has not.

    A directory on one's own machine is one's own; in a fleet it is the workers'.
    """
    own = ENGINE.having("directory") if permissions.own_machine else {}
    for name, value in options.items():
        if value not in (None, False, "", [], {}, ()) and name not in own and (why := risk(name, value)) is not None:
            permissions.require(name, why, field=f"engine_options.{name}")
