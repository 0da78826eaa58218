"""pyarrow imports pandas at its first array where it is installed: a third of a second, for what a job never uses."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _Hidden(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is hidden for a moment", name=fullname)


def hide_pandas() -> None:
    """Have pyarrow's search for pandas, of which it makes one in a process, find nothing.

    Who converts to pandas is not concerned: it is imported then. Nothing happens where pandas is loaded, or where
    engines are installed that are not ours: they may make arrays of what pandas holds.
    """
    from pipeline.engines.registry import BUILT_IN, names

    if "pandas" in sys.modules or set(names()) - set(BUILT_IN):
        return
    import pyarrow as pa

    hidden = _Hidden()
    sys.meta_path.insert(0, hidden)
    try:
        pa.array([])
    finally:
        sys.meta_path.remove(hidden)
