"""Keeping a lease alive from a thread of its own, while a step that may take any time runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from storage.errors import IllegalTransition, LeaseLost

log = logging.getLogger(__name__)


@contextmanager
def renewals(renew: Callable[[], object], *, lease_seconds: float, whose: str) -> Iterator[None]:
    """Call ``renew`` three times per lease. One that raises :class:`LeaseLost` is the last (or
    :class:`IllegalTransition`: there is nothing to hold any more); other errors are logged."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(lease_seconds / 3):
            try:
                renew()
            except (LeaseLost, IllegalTransition):
                return
            except Exception as error:
                log.warning("the lease of %s could not be renewed, trying again: %s", whose, error)

    thread = threading.Thread(target=keep, name="rowmill-renewals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
