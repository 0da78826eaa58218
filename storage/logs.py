"""Logging of this process: to standard error, without secrets."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

from storage.redaction import redact_text

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RedactedFormatter(logging.Formatter):
    """What another formatter makes of a record, tracebacks included, with secrets hidden."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return redact_text(self._inner.format(record))


def set_up(level: str) -> None:
    """Log to standard error from ``level`` on, unless the process has set up its logging already."""
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format=_FORMAT)
    hide_secrets(logging.getLogger().handlers)


def hide_secrets(handlers: Iterable[logging.Handler]) -> None:
    """Have these handlers write no secrets. Safe to repeat."""
    for handler in handlers:
        if not isinstance(handler.formatter, RedactedFormatter):
            handler.setFormatter(RedactedFormatter(handler.formatter or logging.Formatter()))
