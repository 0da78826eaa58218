"""``rowmill model benchmark``: how a model runs fastest on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

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
        Literal["generate", "embed", "classify", "score", "tensor"] | None,
        typer.Option("-t", "--task", metavar="TASK", help="By the model, if not given: generate, or embed."),
    ] = None,
    column: Annotated[str | None, typer.Option(metavar="COLUMN", help="The text; 'text' if not given.")] = None,
    pair_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="The second text of a pair.")] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Rows to measure on, at most.")] = 4096,
    engine: Annotated[str, typer.Option("-e", "--engine", metavar="ENGINE")] = "auto",
    engine_option: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the engine's own.")
    ] = None,
) -> None:
    """Measure how a model runs fastest on this machine, and remember it for later jobs. For a language model on vLLM,
    measure how fast it is.

    Without INPUT, texts are made up. Without a measurement, a job runs an encoder as the number of cores suggests.
    vLLM's settings are given with --set, here as in jobs.

    Example: rowmill model benchmark ./all-MiniLM-L6-v2 texts.parquet --column text

    Example: rowmill model benchmark ./llama-3-8b --set max_num_seqs=512
    """
    from pipeline.diagnostics.benchmark import benchmark as measure
    from pipeline.engines.base import EngineContext
    from pipeline.spec.job_spec import Task
    from storage.objects.store import ObjectStore

    settings = invocation.loaded.settings
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    store = ObjectStore(settings.storage_options)
    try:
        with output.only_ours():
            found = measure(
                model,
                None if task is None else Task(task),
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
    invocation.show({"model": model, **found}, _speeds(found) if "speeds" in found else _layouts(found))


def _layouts(found: Mapping[str, Any]) -> str:
    lines = [
        [
            "*" if trial["chosen"] else "",
            trial["layout"],
            output.count(trial["rows_per_second"]),
            f"{trial['ratio']:.2f}",
        ]
        for trial in found["trials"]
    ]
    table = output.table(("", "layout", "rows/s", "ratio"), lines, right=("rows/s", "ratio"))
    return f"{table}\n\njobs will run it as {found['chosen']}"


_SHOWN = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "window",
    "enable_prefix_caching",
    "enforce_eager",
)
"""Of an engine's settings, those that decide its speed."""


def _speeds(found: Mapping[str, Any]) -> str:
    """vLLM's table, and beside it what Rowmill has set and what the machine could do."""
    settings, machine, weights = found["settings"], found["machine"], found["weights"]
    limits = "not known for quantized weights, mixtures of experts and several devices"
    if machine is not None:
        limits = (
            f"{output.size(weights['n_bytes'])} of weights at {output.size(machine['bandwidth'])}/s, "
            f"{machine['flops'] / 1e9:,.0f} GFLOP/s"
        )
    facts = [
        ("start-up", output.duration(found["startup_seconds"])),
        ("KV cache", f"{found['kv_cache_tokens']:,} tokens"),
        ("device", f"{found['device']}, {settings['dtype']}"),
        ("settings", ", ".join(f"{name}={settings[name]}" for name in _SHOWN)),
        ("limits from", limits),
    ]
    lines = [
        [
            row["what"],
            f"{row['requests']:,}",
            f"{row['prompt_tokens']:,}",
            output.count(row["tokens_per_second"]),
            "" if row["limit"] is None else output.count(row["limit"]),
            "" if row["share"] is None else f"{100 * row['share']:.0f}%",
        ]
        for row in found["speeds"]
    ]
    heads = ("", "requests", "prompt tokens", "tokens/s", "limit", "reached")
    return f"{output.pairs(facts)}\n\n{output.table(heads, lines, right=heads[1:])}"
