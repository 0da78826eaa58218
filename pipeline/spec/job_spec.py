"""``JobSpec``: the validated request of a user. The public contract, with JSON Schema."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.spec.json_text import TooDeep, check_depth
from pipeline.spec.places import no_credentials, plain_place, writable_place
from pipeline.spec.prompt_template import Template
from pipeline.spec.request_fields import RequestFields, check_requests
from pipeline.spec.text_options import TextFields
from pipeline.spec.values import (
    MOST_ITEMS,
    NUMBER,
    STORED,
    AnyText,
    Filled,
    Name,
    Prompt,
    RowSeconds,
    Text,
    Whole,
    all_different,
    invalid,
    plain_json,
    plain_options,
    rule,
)
from storage.errors import InvalidJob


class Task(StrEnum):
    GENERATE = "generate"
    CHAT = "chat"
    EMBED = "embed"
    CLASSIFY = "classify"
    SCORE = "score"
    TENSOR = "tensor"


class Message(BaseModel):
    """One chat turn; ``content`` is a template over the input columns."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Prompt


_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([smhd])\s*$")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_DAYS = 36_500


def duration_seconds(text: str) -> float:
    """``"90s"``, ``"30m"``, ``"24h"``, ``"7d"`` in seconds. Raises ``ValueError`` for anything else."""
    match = _DURATION.match(text)
    if match is None:
        shown = textwrap.shorten(repr(text), 60)
        raise ValueError(f"{shown} is not a duration; write a number and a unit: '90s', '30m', '24h', '7d'")
    return float(match[1]) * _SECONDS[match[2]]


def bounded(text: str) -> None:
    """Raise ``ValueError`` for a duration of nothing, or one that ends beyond all calendars."""
    seconds = duration_seconds(text)
    if not 0 < seconds <= _LONGEST_DAYS * _SECONDS["d"]:
        shown = textwrap.shorten(repr(text), 60)
        raise ValueError(f"{shown} is not above 0 and at most {_LONGEST_DAYS} days; give such a time, as in '24h'")


NOT_PART_OF_THE_WORK = frozenset(
    {"priority", "metadata", "completion_window", "overwrite", "idempotency_key", "profile", "order", "cache"}
)
"""Fields that do not change what is computed: a job may be resumed under other values of them."""


_LATER: dict[str, Any] = {
    **dict.fromkeys(("limit", "sample", "request_timeout", "tensor_columns", "encoding", "csv_delimiter")),
    **dict.fromkeys(("prompt_name", "prefix", "sequence")),
    "csv_types": "auto",
    "csv_schema": {},
    "request_column": None,
    "endpoint": None,
    "openai_lines": False,
}
"""Fields that earlier versions did not have, and the values that say what those did."""
PlainJson = Annotated[dict[str, Any], rule(plain_json)]


class JobSpec(TextFields, RequestFields):
    """Everything that says what a job computes and where to put it. Immutable, and complete: same spec, same work."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    input: Annotated[tuple[Annotated[Text, rule(plain_place)], ...], Field(min_length=1)]
    """Parquet, JSONL, CSV or Arrow IPC: files, globs or directories, on anything that fsspec reads."""
    output: Annotated[Text, Field(min_length=1), rule(plain_place), rule(writable_place)]
    """Directory for the result. It gets ``data/``, ``_manifest.json`` and ``_SUCCESS``."""
    model: Annotated[Filled, rule(no_credentials), Field(min_length=1)]
    """A model directory, a ``.onnx`` file, a registered name, or ``fake``."""
    task: Task
    """generate, chat, embed, classify, score or tensor."""
    engine: Annotated[Filled, Field(min_length=1)] = "auto"
    """auto, vllm, onnx, fake, or the name of an installed plug-in."""
    engine_options: Annotated[dict[str, Any], rule(plain_options)] = {}
    """An option of the engine. vLLM: its ``EngineArgs``; ONNX Runtime: providers and session options."""

    prompt: Prompt | None = None
    """generate, chat: a template with {column} in it, ``"Say: {text}"``. ``chat``: it is the one user message."""
    prompt_token_column: Name | None = None
    """generate: a column of prompts as lists of token ids. It stands in place of ``prompt``; nothing is added to the
    ids."""
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    """chat: the turns of the conversation, in order. Each content is a template over the input columns."""
    column: Name | None = None
    """embed, classify, score: the column of texts; chat: the column of messages."""
    prompt_name: Filled | None = None
    """embed: a prompt of the model's own files, such as query. It stands before every text, as with
    sentence-transformers' ``encode(prompt_name=…)``; ``None`` is the model's default."""
    prefix: Text | None = None
    """embed: a text before every text, such as ``"query: "`` for e5. It replaces the model's own prompts."""
    pair_column: Name | None = None
    """classify, score: the column of the second text of a pair."""
    inputs: dict[Name, Name] | None = None
    """tensor: the column of a graph input, where the names differ."""
    tensor_columns: bool | None = None
    """tensor: write outputs of one axis as Arrow tensors too. Without it they are ``fixed_size_list``, which more
    readers know, and only outputs of more axes are ``arrow.fixed_shape_tensor``."""
    sequence: Name | None = None
    """``tensor``: a column that says which rows are steps of one sequence, in input order. What a row leaves in the
    graph's state (``engine_options.state``) is where the next row of its sequence begins."""
    sampling: PlainJson = {}
    """A sampling parameter, by vLLM's name."""
    sampling_columns: dict[Name, Name] = {}
    """A sampling parameter from a column, row by row. Where the column is null, the value in ``sampling`` holds."""
    chat_template_kwargs: PlainJson = {}
    """chat: a value for the chat template, beside the messages."""
    tools: tuple[PlainJson, ...] = ()
    """chat: functions that the model may call, as OpenAI's API describes them. The chat template writes them into the
    prompt."""
    image_column: Name | None = None
    """generate, chat: a column of images. Each is bytes, a URI below the operator's ``uri_prefixes``, ``struct<bytes,
    path>``, or a list of these. The model must be multimodal."""
    audio_column: Name | None = None
    """generate, chat: a column of sounds. Each is bytes, a URI, ``struct<bytes, path>``, a list of numbers (one
    channel, between -1 and 1), ``struct<array, sampling_rate>``, or a list of these."""
    audio_sampling_rate: Annotated[Whole, Field(ge=1_000, le=768_000)] | None = None
    """Samples per second (Hz) of an ``audio_column`` of numbers."""
    video_column: Name | None = None
    """generate, chat: a column of videos, one in each row. Each is bytes, a URI, ``struct<bytes, path>``, or a list of
    images, which are its frames."""
    video_frame_rate: Annotated[float, Field(gt=0, le=1_000, allow_inf_nan=False), NUMBER] | None = None
    """Frames per second of a ``video_column`` of frames; 1 by default."""
    adapters: dict[Filled, Annotated[Filled, rule(no_credentials)]] = {}
    """generate, chat: a LoRA adapter and its directory. A single one serves every row, unless ``adapter_column`` is
    given."""
    adapter_column: Name | None = None
    """The column with the adapter's name for each row. Where it is null, the model alone answers."""
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """embed: auto, mean, cls or last token. ``auto`` reads the model's own configuration."""
    normalize: bool | None = None
    """embed: scale to unit length. ``None`` reads the model's own configuration."""
    dimensions: Annotated[Whole, Field(ge=1, le=MOST_ITEMS)] | None = None
    """embed: keep only the first N numbers of each vector. The model must be trained for it (Matryoshka); ``None``
    keeps all."""
    embedding_type: Literal["float32", "int8", "binary"] | None = None
    """embed: float32, int8 or binary. ``int8`` is 127 times a unit vector, rounded; ``binary`` is the signs, eight in a
    byte."""
    top_k: Annotated[Whole, Field(ge=1, le=MOST_ITEMS)] | None = None
    """classify: return only the N highest-scoring labels, best first. ``None`` returns all."""
    overlong: Literal["auto", "error", "truncate", "split"] = "auto"
    """What to do with text past the model's limit: auto, error, truncate or split. ``auto`` is an error for generate
    and chat, and truncation (counted) elsewhere; ``split`` (embed) averages the vectors of the text's pieces, weighted
    by their tokens."""

    order: Literal["auto", "input", "prefix"] = "auto"
    """generate, chat: which rows run first: auto, input, or prefix. ``auto``: of the rows that have been read, those
    whose prompts begin alike run together, and among them the longest expected answers first; ``prefix``: the same over
    all rows, which are copied on disk and dealt out to shards by what their prompts begin with; ``input``: the order of
    the input. The output is in input order with each of them."""
    cache: Literal["off", "on", "sampled"] = "off"
    """vllm: take cached results of earlier jobs, and cache these. Results are shared by jobs of one tenant with the
    same model, parameters and prompts. ``on`` (or ``true``): where the prompt determines the answer, by temperature 0
    or a seed; ``sampled``: also for answers that are drawn at random, so that the same ones come again."""
    limit: Annotated[Whole, Field(ge=1)] | None = None
    """Compute only the first N rows of the input, as a job of its own."""
    sample: Annotated[Whole, Field(ge=1)] | None = None
    """Compute only N rows, spread evenly over the input. They are the same rows each time."""
    request_timeout: RowSeconds | None = None
    """vllm: fail a row that takes longer than this inside the engine, in seconds. It is aborted there."""
    keep_columns: Annotated[tuple[AnyText, ...], rule(all_different)] | None = None
    """Input column to copy to the output. ``None`` copies all."""
    output_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*$", max_length=200)] = ""
    """Put before the result columns' names."""
    shard_rows: Annotated[Whole, Field(ge=1)] = 50_000
    """Most rows in a shard."""
    shard_bytes: Annotated[Whole, Field(ge=1)] = 256 * 2**20
    """Most uncompressed input bytes in a shard, estimated from the footers."""
    max_failed_rows: Annotated[Whole, Field(ge=0)] | None = None
    """Stop the job as failed when more rows than this have failed."""

    priority: Annotated[Whole, Field(ge=-100, le=100)] = 0
    """-100 to 100; higher goes first."""
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "default"
    """The tenant whose job it is."""
    idempotency_key: Annotated[Filled, Field(min_length=1, max_length=200)] | None = None
    """The same key again is the same job, not another one."""
    metadata: dict[Text, Text] = {}
    """Text stored with the job."""
    completion_window: Annotated[str, rule(bounded)] = "24h"
    """Give up when the job has not ended after this time: ``90s``, ``30m``, ``24h``, ``7d``."""
    overwrite: bool = False
    """Replace a finished output."""
    profile: bool = False
    """onnx: write traces below the output, in ``_profile``. Each shard's time by operator goes into its attempt's
    stats."""

    @field_validator("input", mode="before")
    @classmethod
    def _one_input_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("cache", mode="before")
    @classmethod
    def _true_is_on(cls, value: Any) -> Any:
        return ("on" if value else "off") if isinstance(value, bool) else value

    @field_validator("tenant", mode="before")
    @classmethod
    def _no_tenant_is_the_default_one(cls, value: Any) -> Any:
        return "default" if value is None else value

    @field_validator("prompt")
    @classmethod
    def _prompt_is_a_template(cls, value: str | None) -> str | None:
        if value is not None:
            Template(value)
        return value

    @field_validator("tools")
    @classmethod
    def _tools_are_functions(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for at, tool in enumerate(value):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
                raise ValueError(
                    f'tool {at} must be {{"type": "function", "function": {{"name": …, "parameters": …}}}}, '
                    "as OpenAI's API describes it"
                )
        return value

    @field_validator("messages")
    @classmethod
    def _messages_are_templates(cls, value: tuple[Message, ...] | None) -> tuple[Message, ...] | None:
        for message in value or ():
            Template(message.content)
        return value

    @model_validator(mode="after")
    def _the_task_has_what_it_reads(self) -> JobSpec:
        task, allowed = self.task, _READS[self.task]
        check_requests(self)
        requests = self.request_column is not None
        given = {name for name in _SHAPING if getattr(self, name) not in (None, {}, ())}
        if extra := sorted(given - allowed):
            reads = ", ".join(sorted(allowed))
            raise ValueError(f"task '{task}' does not read {', '.join(extra)}; it reads {reads}")
        if task is Task.GENERATE and not requests and [self.prompt, self.prompt_token_column].count(None) != 1:
            raise ValueError(
                "task 'generate' needs prompt, a template over the columns, such as \"Say: {text}\" "
                "(or prompt_token_column, and never both)"
            )
        if task is Task.CHAT and not requests and [self.prompt, self.messages, self.column].count(None) != 2:
            raise ValueError("task 'chat' needs exactly one of messages, prompt and column")
        if self.limit is not None and self.sample is not None:
            raise ValueError("limit and sample exclude each other: the first rows, or some from everywhere")
        if self.sample is not None and self.sequence is not None:
            raise ValueError("sample leaves out rows of a sequence, and those after them would change; use limit")
        if self.prompt_name is not None and self.prefix is not None:
            raise ValueError("prompt_name and prefix exclude each other: the model's own prompt, or a text of yours")
        if self.overlong == "split" and task is not Task.EMBED:
            raise ValueError(f"overlong 'split' averages embeddings; task '{task}' has none")
        if task in (Task.EMBED, Task.CLASSIFY, Task.SCORE) and not requests and self.column is None:
            raise ValueError(f"task '{task}' needs column, the name of the text column")
        if self.adapter_column is not None and not self.adapters:
            raise ValueError("adapter_column needs adapters, the directory of each by its name")
        if len(self.adapters) > 1 and self.adapter_column is None:
            raise ValueError("of several adapters, adapter_column says which one a row gets")
        for name, words in _MEDIA.items():
            if getattr(self, name) is not None and self.prompt_token_column is not None:
                raise ValueError(f"{words} go with a prompt or messages, not with prompt_token_column")
            if getattr(self, name) is not None and self.overlong == "truncate":
                raise ValueError(f"a prompt with {words} cannot be truncated; leave overlong at 'auto'")
        for rate, name in (("audio_sampling_rate", "audio_column"), ("video_frame_rate", "video_column")):
            if getattr(self, rate) is not None and getattr(self, name) is None:
                raise ValueError(f"{rate} is of {name}, which is not given")
        return self

    @property
    def window_seconds(self) -> float:
        """The completion window in seconds."""
        return duration_seconds(self.completion_window)

    @property
    def named_columns(self) -> frozenset[str]:
        """The input columns that the fields name, ``keep_columns`` left out."""
        templates = [self.prompt, *(message.content for message in self.messages or ())]
        named = [field for text in templates if text is not None for field in Template(text).fields]
        named += [name for field in _COLUMNS if (name := getattr(self, field)) is not None]
        return frozenset(named) | set((self.inputs or {}).values()) | set(self.sampling_columns.values())

    @property
    def wanted_columns(self) -> frozenset[str] | None:
        """The input columns that the job reads or keeps; ``None`` where its fields alone do not tell."""
        named = self.named_columns
        # A graph's inputs are columns of their names, and those are in the graph.
        if self.keep_columns is None or self.task is Task.TENSOR or not named:
            return None
        return named | set(self.keep_columns)

    def work_hash(self) -> str:
        """SHA-256 (hex) of the fields that decide what is computed: two specs that agree may share one job."""
        work = {k: v for k, v in self.model_dump(mode="json").items() if k not in NOT_PART_OF_THE_WORK}
        # Jobs of versions that did not know these fields go on.
        work = {k: v for k, v in work.items() if k not in _LATER or v != _LATER[k]}
        if self.sampling.get("structured_outputs"):
            # The properties of a JSON Schema are answered in its order, which sorting would hide.
            work["form"] = json.dumps(self.sampling["structured_outputs"])
        if self.tools:
            # The prompt holds them unchanged.
            work["tools"] = json.dumps(work["tools"])
        return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()


_COLUMNS = (
    *("column", "pair_column", "prompt_token_column", "adapter_column", "sequence", "request_column"),
    *("image_column", "audio_column", "video_column"),
)
_MEDIA = {"image_column": "images", "audio_column": "sounds", "video_column": "videos"}
_ANSWERS = frozenset(
    {
        *("sampling", "sampling_columns", "adapters", "adapter_column"),
        *(*_MEDIA, "audio_sampling_rate", "video_frame_rate"),
    }
)
_READS: dict[Task, frozenset[str]] = {
    Task.GENERATE: frozenset({"prompt", "prompt_token_column"}) | _ANSWERS,
    Task.CHAT: frozenset({"prompt", "messages", "column", "chat_template_kwargs", "tools"}) | _ANSWERS,
    Task.EMBED: frozenset({"column", "prompt_name", "prefix", "dimensions", "embedding_type"}),
    Task.CLASSIFY: frozenset({"column", "pair_column", "top_k"}),
    Task.SCORE: frozenset({"column", "pair_column"}),
    Task.TENSOR: frozenset({"inputs", "tensor_columns", "sequence"}),
}
_SHAPING = frozenset().union(*_READS.values())
"""Fields that only some tasks read."""


def parse(fields: dict[str, Any]) -> JobSpec:
    """A spec from keyword arguments, or :class:`InvalidJob` naming every field at fault and why."""
    for name, value in fields.items():
        try:
            check_depth(value)  # pydantic's own messages repeat the value, and recurse in it
        except TooDeep as error:
            raise InvalidJob(str(error), field=name) from None
    try:
        return JobSpec(**fields)
    except ValidationError as error:
        raise invalid(error) from None


def stored(fields: Mapping[str, Any]) -> JobSpec:
    """The spec of a job in the database, which may be of an earlier version with fewer rules.

    Raises :class:`InvalidJob` for one that makes no sense to this version.
    """
    try:
        return JobSpec.model_validate(dict(fields), context=STORED)
    except ValidationError as error:
        raise invalid(error) from None
