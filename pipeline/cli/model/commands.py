"""``rowmill model``: make a graph from a checkpoint, make it smaller, and measure how far it is from the original."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli import errors, output, values
from pipeline.cli.command import Invocation, command
from pipeline.cli.model.registry import located

if TYPE_CHECKING:
    from pipeline.models.compare import Limits
    from pipeline.models.model import Model

app = typer.Typer(help="Models: register, prove, activate; export to ONNX, quantize, benchmark.", no_args_is_help=True)

CALIBRATION_ROWS = 512
"""Most rows that calibration looks at."""

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or a .onnx file.", show_default=False)]
_Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The new model directory.")]
_TaskName = Literal["embed", "classify", "score", "tensor"]


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
    from pipeline.models import variant
    from pipeline.models.export import exported

    found = _resolve(invocation, model)
    folder = text.read(found)
    with variant.new_directory(out) as work:
        done = exported(
            folder.weights,
            "encoder" if task == "embed" else "classifier",
            found.digest,
            invocation.loaded.settings.cache_dir,
            invocation.notice,
            name=found.name,
            tokenizer=folder.tokenizer is None,
        )
        variant.copy_files(found, work)
        variant.copy_graph(done.graph, work)
        if done.tokenizer is not None:
            tokenizer = work / folder.weights.relative_to(folder.root) / "tokenizer.json"
            tokenizer.write_bytes(done.tokenizer.read_bytes())
    _report(
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
        typer.Option(metavar="PARQUET", help="Rows to take the scale of the activations from: static, not dynamic."),
    ] = None,
    task: Annotated[_TaskName | None, typer.Option("-t", "--task", metavar="TASK", help="What those rows are.")] = None,
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
    from pipeline.models import quantize, variant
    from storage.errors import InvalidJob

    found = _resolve(invocation, model)
    graph = variant.graph_of(found)
    if calibrate is None and (task or column or pair_column or graph_input or engine_option):
        raise InvalidJob("--task, --column, --input and --set are about the rows of --calibrate", field="calibrate")
    with variant.new_directory(out) as work:
        variant.copy_files(found, work)
        if calibrate is None:
            quantize.dynamic(graph, work / variant.GRAPH)
        else:
            if task is None:
                raise InvalidJob("--calibrate needs --task, which says how its rows are read", field="task")
            fields: dict[str, Any] = {"task": task, "column": column, "pair_column": pair_column}
            if graph_input:
                fields["inputs"] = values.key_values(graph_input, "--input", literal=True)
            if engine_option:
                fields["engine_options"] = values.key_values(engine_option, "--set")
            feeds = _feeds(invocation, found, calibrate, {k: v for k, v in fields.items() if v is not None})
            quantize.static(graph, work / variant.GRAPH, feeds)
        before, after = quantize.check_smaller(graph, work / variant.GRAPH)
    if calibrate is None:
        invocation.notice("a row's result now depends on its batch, a little: validate it on rows of yours")
    method = "dynamic, per channel" if calibrate is None else "static, per channel (QDQ)"
    facts = {"model": str(out), "method": method, "bytes_before": before, "bytes": after}
    _report(invocation, facts | {"times_smaller": round(before / after, 2)})


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
    options = {"sessions": 1, **registry.settled(name, spec, model, batch.schema).engine_options}
    context = EngineContext(invocation.loaded.settings.cache_dir, invocation.notice)
    engine = registry.engine_class(name)(model, spec.task, options, context)
    assert isinstance(engine, FeedsGraphs)
    try:
        engine.load()
        yield from engine.feeds(spec, [RowBatch(np.arange(batch.num_rows), batch.select(list(columns)))])
    finally:
        engine.close()


@app.command()
@command
def validate(
    invocation: Invocation,
    model: _Model,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Rows to compare on: some hundreds.", show_default=False)
    ],
    against: Annotated[str, typer.Option(metavar="MODEL", help="The model that it should agree with.")],
    task: Annotated[_TaskName, typer.Option("-t", "--task", metavar="TASK", help="embed, classify, score or tensor.")],
    column: Annotated[str | None, typer.Option(metavar="COLUMN", help="The text or image.")] = None,
    pair_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="The second text of a pair.")] = None,
    prompt_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="embed: a prompt of the model's own, such as query.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="embed: put before every text, such as 'query: '.")
    ] = None,
    graph_input: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME=COLUMN", help="tensor: the column of a graph input.")
    ] = None,
    engine_option: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the engine's own.")
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(metavar="X", help="embed, tensor: least cosine of any row; 0.95 by default.")
    ] = None,
    mean_cosine: Annotated[
        float | None, typer.Option(metavar="X", help="embed, tensor: least mean cosine; 0.985 by default.")
    ] = None,
    length_change: Annotated[
        float | None,
        typer.Option(
            "--max-length-change",
            metavar="X",
            help="embed, tensor: of a vector's length, by default 0.1; 0.01 of unit.",
        ),
    ] = None,
    agreement: Annotated[
        float | None, typer.Option(metavar="X", help="classify: least share of rows with the same label; 0.99.")
    ] = None,
    relative_difference: Annotated[
        float | None,
        typer.Option(
            "--max-relative-difference",
            metavar="X",
            help="classify, score, tensor: root mean square of the differences, over the spread; 0.25 by default.",
        ),
    ] = None,
    max_difference: Annotated[
        float | None, typer.Option(metavar="X", help="Largest difference of any number; not looked at by default.")
    ] = None,
) -> int:
    """Run two models over the same rows and say how far they are apart: PASS, or FAIL and exit code 1."""
    import tempfile

    given = {
        "min_cosine": min_cosine,
        "mean_cosine": mean_cosine,
        "agreement": agreement,
        "max_difference": max_difference,
        "relative_difference": relative_difference,
        "length_change": length_change,
    }
    limits, asked = _limits(task, {name: value for name, value in given.items() if value is not None})
    fields: dict[str, Any] = {"input": inputs, "task": task, "column": column, "pair_column": pair_column}
    fields |= {"prompt_name": prompt_name, "prefix": prefix}
    if graph_input:
        fields["inputs"] = values.key_values(graph_input, "--input", literal=True)
    if engine_option:
        fields["engine_options"] = values.key_values(engine_option, "--set")
    fields = {name: value for name, value in fields.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="rowmill-validate-") as folder:
        drift = _compared(invocation, against, model, fields, Path(folder))
    broken = limits.broken(drift, asked)
    facts = {"model": model, "against": against, **drift.to_json(), "verdict": "FAIL" if broken else "PASS"}
    _report(invocation, facts | {"reasons": broken} if invocation.as_json or broken else facts)
    return errors.ERROR if broken else errors.OK


def _limits(task: _TaskName, given: dict[str, float]) -> tuple[Limits, frozenset[str]]:
    """The task's limits, with those that were given in their place, and which these are.

    Raises :class:`~storage.errors.InvalidJob` for one that the task's results have nothing for.
    """
    from dataclasses import asdict, replace

    from pipeline.models.compare import DEFAULTS
    from storage.errors import InvalidJob

    usual = DEFAULTS[task]
    able = {name for name, limit in asdict(usual).items() if limit is not None} | {"max_difference"}
    if task == "embed":
        able.add("relative_difference")
    for name in given:
        if name not in able:
            raise InvalidJob(
                f"the results of task '{task}' have none; limits are {', '.join(sorted(able))}", field=name
            )
    return replace(usual, **given), frozenset(given)


def _compared(invocation: Invocation, original: str, other: str, fields: dict[str, Any], folder: Path) -> Any:
    """Both models over the rows, as jobs of a database of their own, and what became of them."""
    import pyarrow.parquet as pq

    from pipeline.client.client import Client
    from pipeline.models.compare import Comparison
    from storage.errors import InvalidJob

    settings = invocation.loaded.settings.model_copy(
        update={"data_dir": folder / "data", "database_url": None, "broker_url": None}
    )
    kept: tuple[str, ...] = ()
    with Client(settings=settings) as client:
        for name, model in (("original", original), ("other", other)):
            invocation.notice(f"running {model}")
            status = client.run(**fields, model=model, output=str(folder / name), keep_columns=kept)
            if not (folder / name / "_SUCCESS").exists():
                raise InvalidJob(f"{model} did not get through the rows: {status.error}", field="model")
    comparison = Comparison()
    first, second = (sorted((folder / name / "data").glob("*.parquet")) for name in ("original", "other"))
    for a, b in zip(first, second, strict=True):
        ours, theirs = pq.read_table(a), pq.read_table(b)
        columns = [name for name in ours.column_names if name not in ("error", "prompt_tokens")]
        try:
            comparison.add(ours, theirs, columns)
        except (ValueError, KeyError) as error:
            raise InvalidJob(f"{other} and {original} give results that cannot be compared: {error}") from error
    return comparison.result()


def _resolve(invocation: Invocation, name: str) -> Model:
    from pipeline.models.resolve import resolve
    from storage.errors import InvalidModel

    model = resolve(located(invocation, name), invocation.loaded.settings.cache_dir)
    if model.path is None:
        raise InvalidModel("'fake' is no model on disk", field="model")
    return model


def _report(invocation: Invocation, facts: dict[str, Any]) -> None:
    if invocation.as_json:
        output.emit_json(facts)
        return
    shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in facts.items()}
    if isinstance(reasons := facts.get("reasons"), list):
        shown["reasons"] = "; ".join(reasons)
    output.emit(output.pairs((key.replace("_", " "), value) for key, value in shown.items()))
