"""What every command shares: the options all of them take, the settings they run under, and how their errors end."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import errors, output
from pipeline.cli.streams import OutputError
from pipeline.cli.values import setting_values
from pipeline.spec.json_text import check_text
from storage.errors import InvalidJob
from storage.log_actions import Action
from storage.redaction import redact_text

if TYPE_CHECKING:
    from pipeline.client.client import Client
    from pipeline.config.settings import LoadedSettings
    from storage.logs import Log

_PANEL = "Every command"


def _shared(
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout instead of text.", rich_help_panel=_PANEL)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress and no notices on stderr.", rich_help_panel=_PANEL)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_PANEL)
    ] = False,
    data_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the embedded database lives.", rich_help_panel=_PANEL)
    ] = None,
    database_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Database to use instead.", rich_help_panel=_PANEL)
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any setting, by its name in 'config show'.", rich_help_panel=_PANEL),
    ] = None,
) -> None:
    """Only its signature is used: these options are added to every command."""


@dataclass
class Invocation:
    """One run of a command: its shared options, and what is made from them when it is needed."""

    as_json: bool = False
    quiet: bool = False
    debug: bool = False
    data_dir: str | None = None
    database_url: str | None = None
    setting: list[str] | None = None
    failure_details: dict[str, Any] = field(default_factory=dict)
    """Put into the JSON document when the command fails: what is known at that point."""
    job_id: str | None = None
    """A job that this command has stored; told when what follows fails."""
    service_log: Log | None = None
    """Takes notices and the error in place of the terminal."""

    @functools.cached_property
    def loaded(self) -> LoadedSettings:
        """The settings with their sources. Raises :class:`~storage.errors.InvalidSettings`."""
        from pipeline.config.settings import load_settings

        values = setting_values(self.setting or ())
        flags = dict.fromkeys(values, "--setting")
        for name, value in (("data_dir", self.data_dir), ("database_url", self.database_url)):
            if value is not None:
                values[name], flags[name] = value, "--" + name.replace("_", "-")
        return load_settings(values, flags)

    def client(self) -> Client:
        """The client of the database that the settings name, with logging set up first."""
        from pipeline.client.client import Client

        self.set_up_logging()
        return Client(settings=self.loaded.settings)

    def set_up_logging(self, *, service: bool = False) -> None:
        """Log as the settings say. What a ``service`` tells is part of its log where that is JSON."""
        from storage import logs

        settings = self.loaded.settings
        logs.set_up(settings.log_level, settings.log_format)
        if service and settings.log_format == "json":
            self.service_log = logs.get_logger("rowmill")
            self.service_log.setLevel("INFO")  # notices are written at any log_level, as they are on a terminal

    def notice(self, message: str) -> None:
        """A line for the person at the terminal."""
        if self.quiet:
            return
        if self.service_log is not None:
            self.service_log.info("%s", message, action=Action.COMMAND_NOTICE)
        else:
            say(message)

    def show(self, document: Mapping[str, Any], text: str) -> None:
        """The result on stdout: the document with ``--json``, else the text."""
        if self.as_json:
            output.emit_json(document)
        else:
            output.emit(text)

    def show_table(
        self,
        document: Mapping[str, Any],
        columns: Sequence[str],
        lines: Iterable[Sequence[object]],
        *,
        none: str,
        right: Sequence[str] = (),
    ) -> None:
        """A list on stdout: the document with ``--json``, else a table; without lines, the notice ``none``."""
        if self.as_json:
            output.emit_json(document)
        elif found := list(lines):
            output.emit(output.table(columns, found, right))
        else:
            self.notice(none)

    def fail(self, error: BaseException) -> int:
        """Tell what went wrong, and return the exit code."""
        failure = errors.describe(error)
        message = failure.message
        if not failure.expected:
            try:
                kept_in: Path | None = self.loaded.settings.data_dir
            except Exception:  # the settings may be what failed; the log then goes to a temporary directory
                kept_in = None
            message += f"\nThis is a defect in Rowmill. The details are in {errors.write_crash_log(error, kept_in)}"
        if self.debug:
            import traceback

            say("".join(traceback.format_exception(error)))
        if self.job_id is not None:
            message += f"\nJob {self.job_id} is stored: 'rowmill job show {self.job_id}' says how it goes on."
        if self.service_log is not None:
            self.service_log.error("%s", message, action=Action.COMMAND_FAILED)
        else:
            say(message, error=True)
        if self.as_json and not isinstance(error, OutputError):
            with contextlib.suppress(OutputError):
                output.emit_json({"error": failure.to_json(), **self.failure_details})
        return failure.exit_code


def say(message: str, *, error: bool = False) -> None:
    """A message on stderr, unchanged: no markup, no wrapping; ``error:`` before it is red on a terminal."""
    from pipeline.client.progress import console as stderr_console

    text = "\n".join(output.printable(line) for line in redact_text(message).splitlines())
    console = stderr_console(soft_wrap=True)
    with contextlib.suppress(OSError):  # a stderr that is full or closed keeps nothing from being done
        if error:
            console.print("error:", style="bold red", end=" ")
        console.print(text)


def _check_arguments(values: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuse arguments that are not UTF-8, by what their users call them: nothing could store or show them."""
    for name, value in values.items():
        try:
            check_text(value)
        except ValueError as error:
            raise InvalidJob(str(error), field=_called(parameters[name])) from None


def _called(parameter: inspect.Parameter) -> str:
    """What a user calls a command's parameter: ``--output``, ``INPUT``."""
    for info in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(info, typer.models.ArgumentInfo) and info.metavar:
            return info.metavar.strip("[].")
        # typer keeps the first name as the default until it builds the command.
        for declared in (getattr(info, "default", None), *(getattr(info, "param_decls", None) or ())):
            if isinstance(declared, str) and declared.startswith("--"):
                return declared.partition("/")[0]
    return "--" + parameter.name.replace("_", "-")


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """Make a typer command: add the shared options, pass them as an :class:`Invocation`, end with the exit code.

    ``function`` takes the invocation first and returns its exit code, ``None`` for 0. Whatever it raises becomes one
    message and one exit code; only a closed pipe is left to typer.
    """
    own = inspect.signature(function, eval_str=True)
    shared = inspect.signature(_shared, eval_str=True)
    first, *rest = own.parameters.values()
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*rest, *shared.parameters.values())]

    @functools.wraps(function)
    def wrapper(**values: Any) -> None:
        invocation = Invocation(**{name: values.pop(name) for name in shared.parameters})
        try:
            _check_arguments({**values, **vars(invocation)}, {**own.parameters, **shared.parameters})
            code = function(invocation, **values) or errors.OK
        except (typer.Exit, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            code = invocation.fail(error)
        raise typer.Exit(code)

    wrapper.__signature__ = own.replace(parameters=keyword, return_annotation=None)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in keyword}
    assert first.annotation is Invocation
    return wrapper
