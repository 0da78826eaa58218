"""The ``rowmill`` command. Each command is imported when it is called, so that ``--help`` is quick."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from pipeline.cli import errors, streams
from pipeline.cli.command import Invocation
from pipeline.cli.command_list import LazyGroup
from pipeline.cli.streams import OutputError
from storage.redaction import redact_text

_GC_THRESHOLD = 50_000
"""Objects that have come into being, less those that went, before the youngest are searched for cycles."""


class _Group(LazyGroup):
    """Typer's group of commands, whose words about wrong usage repeat no secret."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """See Typer."""
        with _redacted():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """See Typer."""
        with _redacted():
            return super().invoke(ctx)


@contextmanager
def _redacted() -> Iterator[None]:
    try:
        yield
    except _USAGE_ERROR as error:
        error.message = redact_text(error.message)
        raise


_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""The base of all that Typer says about wrong usage; it has no public name."""

app = typer.Typer(
    name="rowmill",
    cls=_Group,
    help="Rows of Parquet in, a model over every row, rows of Parquet out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"rowmill {version('rowmill')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Its options only."""


def main() -> None:
    """The entry point: run the command line in ``sys.argv``, and end the process with its exit code."""
    # Imports and class bodies make few cycles: at the default of 700 a tenth of the start is spent looking for them.
    gc.set_threshold(_GC_THRESHOLD)
    streams.prepare()
    sys.exit(streams.finish(_run()))


def _run() -> int:
    try:
        app(prog_name="rowmill")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else errors.OK if end.code is None else errors.ERROR
    except Exception as error:  # outside of every command: the help could not be printed
        wrapped = OutputError(error) if isinstance(error, OSError) and error.filename is None else error
        return Invocation().fail(wrapped)
    return errors.OK


if __name__ == "__main__":
    main()
