"""Environment variables that are set while processes are started."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping

_lock = threading.RLock()


@contextlib.contextmanager
def holding(values: Mapping[str, str]) -> Iterator[None]:
    """``values`` are in this process's environment meanwhile; afterwards they are what they were.

    The environment is the process's: threads hold it one after the other, or one engine that starts would be given
    what is meant for another, and what each found and puts back could be the other's.
    """
    with _lock:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
