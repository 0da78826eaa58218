"""Logging of this process: to standard error, as text or as JSON, without secrets.

Modules log with :func:`get_logger`; the ids of what is under way are :func:`bound` around it. structlog, which brings
rich, is imported with the first record or id, so that importing a module that logs stays cheap.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from functools import cached_property, partial
from typing import Any, Final, Literal

from storage.errors import RowmillError
from storage.log_actions import Action
from storage.redaction import redact_text

LogFormat = Literal["console", "json"]

FIELDS: Final = (
    "action",
    "tenant",
    "job_id",
    "shard_id",
    "shard",
    "attempt",
    "worker",
    "schedule",
    "batch_id",
    "request_id",
)
"""What a record may carry beside its text; ``shard`` and ``attempt`` are the numbers that commands show."""


class Log(logging.LoggerAdapter[logging.Logger]):
    """The standard library's logger of a module, whoever has set that up: ``log.info(text, …, action=…, job_id=…)``.

    Every call names an ``action``; the other fields are those of the call, or those that :func:`bound` gave.
    """

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """The text, and the fields as ``extra``."""
        fields: dict[str, Any] = {"action": kwargs.pop("action")}
        fields |= {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        return msg, {**kwargs, "extra": _bound_ids() | fields}

    def failure(self, text: str, error: BaseException, **fields: Any) -> None:
        """A warning that ends with the error; for one that is not of ours, an error with its traceback."""
        if isinstance(error, RowmillError):
            self.warning("%s: %s", text, error, **fields)
        else:
            self.error("%s", text, exc_info=error, **fields)


def get_logger(name: str) -> Log:
    """The log of a module."""
    return Log(logging.getLogger(name))


def bound(**ids: Any) -> AbstractContextManager[None]:
    """Whatever is logged inside carries these ids, by libraries too; names are those of :data:`FIELDS`."""
    from structlog.contextvars import bound_contextvars

    return bound_contextvars(**ids)


def _bound_ids() -> dict[str, Any]:
    from structlog.contextvars import get_contextvars

    # No other names: a program that uses this one may have bound some that no record can carry.
    ids = get_contextvars()
    return {name: ids[name] for name in FIELDS if name in ids}


def thread_with_ids(name: str, function: Callable[..., object], *arguments: object) -> threading.Thread:
    """A daemon thread, not started yet, that logs with the ids that are bound here and now."""
    return threading.Thread(target=copy_context().run, args=(function, *arguments), name=name, daemon=True)


def pool_with_ids(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads log with the ids that are bound here and now."""
    from structlog.contextvars import bind_contextvars

    return ThreadPoolExecutor(threads, name, initializer=partial(bind_contextvars, **_bound_ids()))


class RedactedFormatter(logging.Formatter):
    """What another formatter makes of a record, tracebacks included, with secrets hidden."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return redact_text(self._inner.format(record))


class ConsoleFormatter(logging.Formatter):
    """One line for a person, and the fields at its end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is the base class's
        """The line, before a traceback."""
        known = _bound_ids() | record.__dict__
        fields = " ".join(f"{name}={known[name]}" for name in FIELDS if name in known)
        return super().formatMessage(record) + (fields and f" [{fields}]")


class JsonFormatter(logging.Formatter):
    """Records of ours and of libraries, each as one JSON object on one line, with secrets hidden."""

    @cached_property
    def _inner(self) -> logging.Formatter:
        from structlog.processors import JSONRenderer, TimeStamper, format_exc_info
        from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name

        return ProcessorFormatter(
            foreign_pre_chain=[
                lambda _, __, event: {**event, **_bound_ids()},
                ExtraAdder(allow=FIELDS),
                add_log_level,
                add_logger_name,
                TimeStamper(fmt="iso", utc=True),
            ],
            processors=[
                ProcessorFormatter.remove_processors_meta,
                format_exc_info,
                _hide_secrets,
                JSONRenderer(),
            ],
        )

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        return self._inner.format(record)


def _hide_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    # Before it becomes JSON: a rule that hides up to the next quote could otherwise break the quoting.
    return {name: redact_text(value) if isinstance(value, str) else value for name, value in event.items()}


def set_up(level: str, log_format: LogFormat) -> None:
    """Log to standard error from ``level`` on, unless the process has set up its logging already.

    With ``json``, warnings of Python and errors that nothing handles become records too, so that each line is JSON.
    """
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        root.addHandler(handler)
        root.setLevel(level.upper())
        format_as(log_format, [handler])
        if log_format == "json":
            _log_what_python_writes()
    hide_secrets(root.handlers)


def format_as(log_format: LogFormat, handlers: Iterable[logging.Handler]) -> None:
    """Have these handlers write records as ``log_format`` says, without secrets."""
    for handler in handlers:
        console = RedactedFormatter(ConsoleFormatter())
        handler.setFormatter(JsonFormatter() if log_format == "json" else console)


def hide_secrets(handlers: Iterable[logging.Handler]) -> None:
    """Have these handlers write no secrets, in the format that they have. Safe to repeat."""
    for handler in handlers:
        if not isinstance(handler.formatter, (RedactedFormatter, JsonFormatter)):
            handler.setFormatter(RedactedFormatter(handler.formatter or logging.Formatter()))


def _log_what_python_writes() -> None:
    log = get_logger("rowmill")

    def crashed(error: BaseException | None) -> None:
        if not isinstance(error, SystemExit):  # in a thread it is a way to end
            log.critical("nothing handled this error", exc_info=error, action=Action.PROCESS_CRASHED)

    logging.captureWarnings(True)
    sys.excepthook = lambda _, error, __: crashed(error)
    threading.excepthook = lambda args: crashed(args.exc_value)
