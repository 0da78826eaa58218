"""Libraries of custom operators: code that runs inside the worker, so only what the operator has named is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.errors import InvalidJob

_FIELD = "engine_options.custom_ops"


def libraries(asked: Any, allowed: Sequence[Path]) -> tuple[Path, ...]:
    """The libraries that a job asks for, links resolved, in its order. ``allowed``: the setting ``custom_op_paths``.

    Raises :class:`~storage.errors.InvalidJob` for a library that is not allowed, or not there.
    """
    if asked is None:
        return ()
    if not isinstance(asked, (list, tuple)) or not all(isinstance(path, str) for path in asked):
        raise InvalidJob('a list of paths, such as ["/opt/ops/libops.so"]', field=_FIELD)
    known = {path.resolve() for path in allowed}
    found = [Path(path).expanduser().resolve() for path in asked]
    for name, path in zip(asked, found, strict=True):
        if path not in known:
            named = ", ".join(map(str, allowed)) or "none"
            raise InvalidJob(
                f"{name} is no library that the operator allows; the setting custom_op_paths names {named}",
                field=_FIELD,
            )
        if not path.is_file():
            raise InvalidJob(f"the library {path} is not there", field=_FIELD)
    return tuple(found)


def digests(paths: Sequence[Path]) -> dict[str, str]:
    """File name → SHA-256 (hex) of each library, for the manifest: another build may compute something else."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
