"""``rowmill model``: make a graph from a checkpoint, make it smaller, and measure how far it is from the original."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli import output, values
from pipeline.cli.command import Invocation, command
from pipeline.cli.model.registry import located

if TYPE_CHECKING:
    from pipeline.models.model import Model

app = typer.Typer(help="Models: register, prove, activate; export to ONNX, quantize, benchmark.", no_args_is_help=True)

CALIBRATION_ROWS = 512
"""Most rows that calibration looks at."""

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or a .onnx file.", show_default=False)]
_Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The new model directory.")]
TaskName = Literal["embed", "classify", "score", "tensor"]


@app.command()
@command
def export(
    invocation: Invocation,
    model: _Model,
    out: _Output,
    task: Annotated[
        Literal["embed", "classify", "score"], typer.Option("-t", "--task", metavar="TASK", help="What it is for.")
    ] = "embed",
) -> None:
    """Turn a PyTorch checkpoint of texts into a directory with an ONNX graph, checked against PyTorch."""
    from pipeline.engines.model_config import text
    from pipeline.models import derived_model, origin
    from pipeline.models.export import exported

    found = _resolve(invocation, model)
    folder = text.read(found)
    with derived_model.new_directory(out) as work:
        done = exported(
            folder.weights,
            "encoder" if task == "embed" else "classifier",
            found.digest,
            invocation.loaded.settings.cache_dir,
            invocation.notice,
            name=found.name,
            tokenizer=folder.tokenizer is None,
        )
        derived_model.copy_files(found, work)
        derived_model.copy_graph(done.graph, work)
        origin.write(work, found)
        if done.tokenizer is not None:
            tokenizer = work / folder.weights.relative_to(folder.root) / "tokenizer.json"
            tokenizer.write_bytes(done.tokenizer.read_bytes())
    report(
        invocation,
        {"model": str(out), "exporter": done.exporter, "max_difference_from_pytorch": done.max_abs_diff},
    )


@app.command()
@command
def quantize(
    invocation: Invocation,
    model: _Model,
    out: _Output,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="PARQUET", help="Rows that calibrate the activations: static, in place of dynamic."),
    ] = None,
    task: Annotated[
        TaskName | None, typer.Option("-t", "--task", metavar="TASK", help="How to read those rows.")
    ] = None,
    column: Annotated[str | None, typer.Option(metavar="COLUMN", help="Their text or image.")] = None,
    pair_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="Their second text.")] = None,
    graph_input: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME=COLUMN", help="tensor: the column of a graph input.")
    ] = None,
    engine_option: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An engine option to read those rows with.")
    ] = None,
) -> None:
    """Make an ONNX graph 8-bit: dynamic, or static by calibration rows. Compare before use: 'model validate'.

    Refused where the result is not smaller.
    """
    from pipeline.models import derived_model, origin, quantize
    from storage.errors import InvalidJob

    found = _resolve(invocation, model)
    graph = derived_model.graph_of(found)
    if calibrate is None and (task or column or pair_column or graph_input or engine_option):
        raise InvalidJob("--task, --column, --input and --set are about the rows of --calibrate", field="calibrate")
    with derived_model.new_directory(out) as work:
        derived_model.copy_files(found, work)
        if calibrate is None:
            quantize.dynamic(graph, work / derived_model.GRAPH)
        else:
            if task is None:
                raise InvalidJob("--calibrate needs --task, which says how its rows are read", field="task")
            fields = row_fields(graph_input, engine_option, task=task, column=column, pair_column=pair_column)
            feeds = _feeds(invocation, found, calibrate, fields)
            quantize.static(graph, work / derived_model.GRAPH, feeds)
        before, after = quantize.check_smaller(graph, work / derived_model.GRAPH)
        origin.write(work, found, () if calibrate is None else _hashes(calibrate, column, pair_column))
    if calibrate is None:
        invocation.notice("a row's result now depends on its batch, a little: validate it on rows of yours")
    method = "dynamic, per channel" if calibrate is None else "static, per channel (QDQ)"
    facts = {"model": str(out), "method": method, "bytes_before": before, "bytes": after}
    report(invocation, facts | {"times_smaller": round(before / after, 2)})


def row_fields(graph_input: list[str] | None, engine_option: list[str] | None, **given: Any) -> dict[str, Any]:
    """The fields of a job that reads the rows: those that are given, with what ``--input`` and ``--set`` say."""
    if graph_input:
        given["inputs"] = values.key_values(graph_input, "--input", literal=True)
    if engine_option:
        given["engine_options"] = values.key_values(engine_option, "--set")
    return {name: value for name, value in given.items() if value is not None}


def _hashes(rows: Path, *columns: str | None) -> list[str]:
    """What identifies the rows that calibrate: of the text columns, those that a validation reads."""
    import pyarrow.parquet as pq

    from pipeline.models.origin import row_hash

    named = [name for name in columns if name is not None]
    batch = next(pq.ParquetFile(rows).iter_batches(CALIBRATION_ROWS, columns=named), None) if named else None
    return [] if batch is None else [row_hash(list(row.values())) for row in batch.to_pylist()]


def _feeds(invocation: Invocation, model: Model, rows: Path, fields: dict[str, Any]) -> Iterator[Any]:
    """What the graph is fed for the first ``CALIBRATION_ROWS`` rows."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.engines import registry
    from pipeline.engines.base import EngineContext, FeedsGraphs, RowBatch
    from pipeline.spec.job_spec import parse
    from storage.errors import InvalidInput

    try:
        file = pq.ParquetFile(rows)
        batch = next(file.iter_batches(CALIBRATION_ROWS), None)
    except (OSError, pa.ArrowInvalid) as error:
        raise InvalidInput(f"{rows} is not read: {error}", field="calibrate") from error
    if batch is None:
        raise InvalidInput(f"{rows} has no rows", field="calibrate")
    name, *_ = registry.names_with(FeedsGraphs)
    spec = parse({**fields, "input": str(rows), "output": "none", "model": model.name, "engine": name})
    columns = registry.check(name, spec, model, batch.schema)
    spec = registry.settled(name, spec, model, batch.schema)
    context = EngineContext(invocation.loaded.settings.cache_dir, invocation.notice)
    kind = registry.engine_class(name)
    assert issubclass(kind, FeedsGraphs)
    engine = kind(model, spec.task, kind.feeding_options(spec.engine_options), context)
    try:
        engine.load()
        yield from engine.feeds(spec, [RowBatch(np.arange(batch.num_rows), batch.select(list(columns)))])
    finally:
        engine.close()


def _resolve(invocation: Invocation, name: str) -> Model:
    from pipeline.models.resolve import resolve
    from storage.errors import InvalidModel

    model = resolve(located(invocation, name), invocation.loaded.settings.cache_dir)
    if model.path is None:
        raise InvalidModel("'fake' is no model on disk", field="model")
    return model


def report(invocation: Invocation, facts: dict[str, Any]) -> None:
    shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in facts.items()}
    if isinstance(reasons := facts.get("reasons"), list):
        shown["reasons"] = "; ".join(reasons)
    invocation.show(facts, output.pairs((key.replace("_", " "), value) for key, value in shown.items()))
