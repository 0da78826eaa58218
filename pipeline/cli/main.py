"""The ``rowmill`` command. Everything heavy is imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli import admin, config, db, doctor, job, model, model_benchmark, schedule, tenant, worker
from pipeline.cli.beat import beat
from pipeline.cli.run import run
from pipeline.cli.submit import estimate, submit

app = typer.Typer(
    name="rowmill",
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
job.app.command()(submit)
job.app.command()(estimate)
app.add_typer(job.app, name="job")
app.add_typer(schedule.app, name="schedule")
app.command(name="beat")(beat)
app.add_typer(worker.app, name="worker")
app.command(name="doctor")(doctor.doctor)
app.add_typer(config.app, name="config")
app.add_typer(db.app, name="db")
app.add_typer(tenant.app, name="tenant")
app.add_typer(admin.app, name="admin")
model.app.command(name="benchmark")(model_benchmark.benchmark)
app.add_typer(model.app, name="model")


def main() -> None:
    """The entry point: run the command line in ``sys.argv``, and end the process with its exit code."""
    app(prog_name="rowmill")


if __name__ == "__main__":
    main()
