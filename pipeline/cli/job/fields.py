"""The options that describe a job: the same for every command that makes one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.cli import values
from storage.errors import InvalidJob

_WORK, _ROWS, _OUT, _QUEUE = "What to compute", "Rows and shards", "Output", "Whose turn it is"
TaskName = Literal["generate", "chat", "embed", "classify", "score", "tensor"]


def _fields(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...", help="Parquet, JSONL, CSV or Arrow files, globs or directories.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", metavar="MODEL", help="A model directory, a .onnx file, or 'fake'.", rich_help_panel=_WORK
        ),
    ] = None,
    task: Annotated[
        TaskName | None,
        typer.Option(
            "-t",
            "--task",
            metavar="TASK",
            help="generate, chat, embed, classify, score or tensor.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--prompt",
            metavar="TEMPLATE",
            help="generate, chat: text with {column} in it.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    message: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=TEMPLATE", help="chat: one turn; may be repeated, in order.", rich_help_panel=_WORK),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="embed, classify, score: the text; chat: the messages.", rich_help_panel=_WORK
        ),
    ] = None,
    pair_column: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="classify, score: the second text of a pair.", rich_help_panel=_WORK),
    ] = None,
    graph_input: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="NAME=COLUMN", help="tensor: the column of a graph input.", rich_help_panel=_WORK
        ),
    ] = None,
    sampling: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A sampling parameter by vLLM's name.", rich_help_panel=_WORK),
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="generate, chat: a JSON Schema that every answer keeps to.", rich_help_panel=_WORK
        ),
    ] = None,
    sampling_column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=COLUMN", help="A sampling parameter from a column, row by row.", rich_help_panel=_WORK
        ),
    ] = None,
    prompt_token_column: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="generate: prompts as lists of token ids.", rich_help_panel=_WORK),
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="generate, chat: images, as bytes or URIs.", rich_help_panel=_WORK),
    ] = None,
    audio_column: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="generate, chat: sounds: bytes, URIs, numbers.", rich_help_panel=_WORK),
    ] = None,
    audio_sampling_rate: Annotated[
        int | None,
        typer.Option(metavar="HZ", help="Of sounds that are numbers.", rich_help_panel=_WORK),
    ] = None,
    video_column: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="generate, chat: videos: bytes, URIs, frames.", rich_help_panel=_WORK),
    ] = None,
    video_frame_rate: Annotated[
        float | None,
        typer.Option(metavar="FPS", help="Of videos that are lists of images; 1 by default.", rich_help_panel=_WORK),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="generate, chat: a LoRA adapter.", rich_help_panel=_WORK),
    ] = None,
    adapter_column: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="The adapter's name for each row.", rich_help_panel=_WORK),
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="chat: a JSON list of functions that the model may call.", rich_help_panel=_WORK
        ),
    ] = None,
    chat_template: Annotated[
        list[str] | None,
        typer.Option(
            "--chat-template-kwarg",
            metavar="KEY=VALUE",
            help="chat: handed to the chat template.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("-e", "--engine", metavar="ENGINE", help="auto, vllm, onnx, fake, …", rich_help_panel=_WORK),
    ] = None,
    engine_option: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the engine's own.", rich_help_panel=_WORK),
    ] = None,
    overlong: Annotated[
        Literal["auto", "error", "truncate", "split"] | None,
        typer.Option(
            metavar="HOW", help="Text past the model's limit: auto, error, truncate or split.", rich_help_panel=_WORK
        ),
    ] = None,
    pooling: Annotated[
        Literal["auto", "mean", "cls", "last"] | None,
        typer.Option(metavar="HOW", help="embed: auto, mean, cls or last token.", rich_help_panel=_WORK),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="embed: scale to unit length.", rich_help_panel=_WORK),
    ] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="embed: a prompt of the model's own, such as query.", rich_help_panel=_WORK),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="embed: put before every text, such as 'query: '.", rich_help_panel=_WORK),
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(metavar="N", help="embed: keep N numbers of a vector.", rich_help_panel=_WORK)
    ] = None,
    embedding_type: Annotated[
        Literal["float32", "int8", "binary"] | None,
        typer.Option(metavar="TYPE", help="embed: float32, int8 or binary.", rich_help_panel=_WORK),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", help="classify: the N best labels only.", rich_help_panel=_WORK)
    ] = None,
    tensor_columns: Annotated[
        bool | None,
        typer.Option(
            "--tensor-columns",
            help="tensor: outputs of one axis as Arrow tensors, too, not as lists of a fixed size.",
            rich_help_panel=_OUT,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="DIR", help="Directory for the result.", rich_help_panel=_OUT),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Input column to copy; all, if never given.", rich_help_panel=_OUT),
    ] = None,
    keep_none: Annotated[bool, typer.Option("--keep-none", help="Copy no input column.", rich_help_panel=_OUT)] = False,
    output_prefix: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="Put before the result columns' names.", rich_help_panel=_OUT)
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="onnx: write traces to DIR/_profile.", rich_help_panel=_OUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished output.", rich_help_panel=_OUT)
    ] = False,
    encoding: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of CSV and JSONL; UTF-8 if not given.", rich_help_panel=_ROWS),
    ] = None,
    csv_delimiter: Annotated[
        str | None,
        typer.Option(metavar="CHAR", help="Separates a CSV's columns: ';', '\\t'.", rich_help_panel=_ROWS),
    ] = None,
    csv_types: Annotated[
        Literal["auto", "text"] | None,
        typer.Option(metavar="HOW", help="Of CSV columns: auto, or text for all.", rich_help_panel=_ROWS),
    ] = None,
    csv_type: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=TYPE", help="The type of a CSV column.", rich_help_panel=_ROWS),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N rows, as a job of its own.", rich_help_panel=_ROWS)
    ] = None,
    sample: Annotated[
        int | None, typer.Option(metavar="N", help="Only N rows, spread evenly.", rich_help_panel=_ROWS)
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="vllm: fail a row that takes longer inside the engine.", rich_help_panel=_ROWS
        ),
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(metavar="N", help="Most rows in a shard.", rich_help_panel=_ROWS)
    ] = None,
    order: Annotated[
        Literal["auto", "input", "prefix"] | None,
        typer.Option(
            metavar="HOW",
            help="generate, chat: which rows run first: auto, input, or prefix (alike together, across shards).",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="vllm: take answers kept by earlier jobs, and keep these.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    cache_sampled: Annotated[
        bool,
        typer.Option("--cache-sampled", help="The same, for answers drawn at random too.", rich_help_panel=_ROWS),
    ] = False,
    max_failed_rows: Annotated[
        int | None, typer.Option(metavar="N", help="Stop when more rows than this have failed.", rich_help_panel=_ROWS)
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            "--completion-window", metavar="TIME", help="Give up after 90s, 30m, 24h, 7d.", rich_help_panel=_ROWS
        ),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Text kept with the job.", rich_help_panel=_OUT),
    ] = None,
    spec: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Job fields as TOML or JSON; options win over it.", rich_help_panel=_WORK),
    ] = None,
    priority: Annotated[
        int | None,
        typer.Option(metavar="N", help="-100 to 100; higher goes first.", rich_help_panel=_QUEUE),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(metavar="NAME", help="On whose account.", rich_help_panel=_QUEUE)
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The same key again is the same job, not another.", rich_help_panel=_QUEUE),
    ] = None,
) -> dict[str, Any]:
    """The job's fields, as the options give them."""
    if keep and keep_none:
        raise InvalidJob("--keep and --keep-none exclude each other")
    flags: dict[str, Any] = {
        "input": inputs,
        "output": out,
        "model": model,
        "task": task,
        "prompt": prompt,
        "messages": values.messages(message) if message else None,
        "column": column,
        "pair_column": pair_column,
        "inputs": values.key_values(graph_input, "--input", literal=True) if graph_input else None,
        "prompt_token_column": prompt_token_column,
        "sampling": values.sampling(sampling or (), schema),
        "sampling_columns": values.key_values(sampling_column, "--sampling-column", literal=True)
        if sampling_column
        else None,
        "image_column": image_column,
        "audio_column": audio_column,
        "audio_sampling_rate": audio_sampling_rate,
        "video_column": video_column,
        "video_frame_rate": video_frame_rate,
        "adapters": values.key_values(adapter, "--adapter", literal=True) if adapter else None,
        "adapter_column": adapter_column,
        "tools": values.json_file(tools, "--tools") if tools else None,
        "chat_template_kwargs": values.key_values(chat_template, "--chat-template-kwarg") if chat_template else None,
        "engine": engine,
        "engine_options": values.key_values(engine_option, "--set") if engine_option else None,
        "overlong": overlong,
        "pooling": pooling,
        "normalize": normalize,
        "tensor_columns": tensor_columns,
        "prompt_name": prompt_name,
        "prefix": prefix,
        "dimensions": dimensions,
        "embedding_type": embedding_type,
        "top_k": top_k,
        "keep_columns": [] if keep_none else keep,
        "output_prefix": output_prefix,
        "overwrite": overwrite or None,
        "profile": profile or None,
        "encoding": encoding,
        "csv_delimiter": csv_delimiter,
        "csv_types": csv_types,
        "csv_schema": values.key_values(csv_type, "--csv-type", literal=True) if csv_type else None,
        "limit": limit,
        "sample": sample,
        "request_timeout": request_timeout,
        "shard_rows": shard_rows,
        "order": order,
        "cache": "sampled" if cache_sampled else cache,
        "max_failed_rows": max_failed_rows,
        "completion_window": window,
        "metadata": values.key_values(metadata, "--metadata", literal=True) if metadata else None,
        "priority": priority,
        "tenant": tenant,
        "idempotency_key": idempotency_key,
    }
    return values.job_fields(values.spec_file(spec) if spec else {}, flags)


def with_job_fields(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Give a command the options of a job: it takes the invocation and the fields, then options of its own."""
    own = inspect.signature(function, eval_str=True)
    added = inspect.signature(_fields, eval_str=True).parameters
    invocation, _, *rest = own.parameters.values()

    @functools.wraps(function)
    def wrapper(given: Any, **options: Any) -> int | None:
        fields = _fields(**{name: options.pop(name) for name in added})
        return function(given, fields, **options)

    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*added.values(), *rest)]
    wrapper.__signature__ = own.replace(parameters=[invocation, *keyword])  # type: ignore[attr-defined]
    return wrapper
