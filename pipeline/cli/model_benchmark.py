"""``rowmill model benchmark``: how a model runs fastest on this machine."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pipeline.cli import output, values
from pipeline.cli.command import Invocation, command


@command
def benchmark(
    invocation: Invocation,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or a .onnx file.")],
    input_file: Annotated[
        str | None, typer.Argument(metavar="[INPUT]", help="A Parquet file with rows to measure on.")
    ] = None,
    task: Annotated[
        Literal["embed", "classify", "score", "tensor"], typer.Option("-t", "--task", metavar="TASK")
    ] = "embed",
    column: Annotated[str | None, typer.Option(metavar="COLUMN", help="The text; 'text' if not given.")] = None,
    pair_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="The second text of a pair.")] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Rows to measure on, at most.")] = 4096,
    engine: Annotated[str, typer.Option("-e", "--engine", metavar="ENGINE")] = "auto",
    engine_option: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the engine's own.")
    ] = None,
) -> None:
    """Measure how a model runs fastest on this machine, and remember it for the jobs to come.

    Without INPUT, texts are made up. Jobs measure by themselves once, on their first rows; this is for a machine that
    was busy then, for slow models, which jobs do not measure, and to see the numbers.

    Example: rowmill model benchmark ./all-MiniLM-L6-v2 texts.parquet --column text
    """
    from pipeline.benchmarking import benchmark as measure
    from pipeline.engines.base import EngineContext
    from pipeline.job_spec import Task
    from storage.objects import ObjectStore

    settings = invocation.loaded.settings
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    store = ObjectStore(settings.storage_options)
    try:
        with output.only_ours():
            found = measure(
                model,
                Task(task),
                EngineContext(settings.cache_dir, invocation.notice),
                store,
                engine=engine,
                options=values.key_values(engine_option, "--set") if engine_option else {},
                rows=rows,
                input_uri=input_file,
                column=column,
                pair_column=pair_column,
            )
    finally:
        store.close()
    if invocation.as_json:
        output.emit_json({"model": model, "task": task, **found})
        return
    lines = [
        [
            "*" if trial["chosen"] else "",
            trial["layout"],
            output.count(trial["rows_per_second"]),
            f"{trial['ratio']:.2f}",
        ]
        for trial in found["trials"]
    ]
    output.emit(output.table(("", "layout", "rows/s", "ratio"), lines, right=("rows/s", "ratio")))
    output.emit(f"\njobs will run it as {found['chosen']}")
