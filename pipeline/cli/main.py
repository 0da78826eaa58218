"""The ``rowmill`` command. Everything heavy is imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.cli import config, doctor, errors, streams
from pipeline.cli.admin import db, maintenance, schedule, tenant, worker
from pipeline.cli.admin.beat import beat
from pipeline.cli.command import Invocation
from pipeline.cli.job import commands
from pipeline.cli.job.submit import estimate, submit
from pipeline.cli.model import benchmark, registry
from pipeline.cli.model import commands as model
from pipeline.cli.run import run
from pipeline.cli.streams import OutputError
from storage.redaction import redact_text


class _Group(TyperGroup):
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


app.command(name="run")(run)
commands.app.command()(submit)
commands.app.command()(estimate)
app.add_typer(commands.app, name="job")
app.add_typer(schedule.app, name="schedule")
app.command(name="beat")(beat)
app.add_typer(worker.app, name="worker")
app.command(name="doctor")(doctor.doctor)
app.add_typer(config.app, name="config")
app.add_typer(db.app, name="db")
app.add_typer(tenant.app, name="tenant")
app.add_typer(maintenance.app, name="admin")
model.app.command(name="benchmark")(benchmark.benchmark)
registry.register(model.app)
app.add_typer(model.app, name="model")


def main() -> None:
    """The entry point: run the command line in ``sys.argv``, and end the process with its exit code."""
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
