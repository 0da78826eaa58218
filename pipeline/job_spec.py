"""``JobSpec``: the validated request of a user. The public contract, with JSON Schema."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.template import Template
from storage.errors import InvalidJob
from storage.redaction import holds_credentials


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
    content: str


_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([smhd])\s*$")
_NOWHERE = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:/*\s*$")
"""A scheme and nothing else: what is left of ``s3://$BUCKET`` when the variable is not set."""
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration_seconds(text: str) -> float:
    """``"90s"``, ``"30m"``, ``"24h"``, ``"7d"`` in seconds. Raises ``ValueError`` for anything else."""
    match = _DURATION.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write a number and a unit: '90s', '30m', '24h', '7d'")
    return float(match[1]) * _SECONDS[match[2]]


NOT_PART_OF_THE_WORK = frozenset(
    {"priority", "metadata", "completion_window", "overwrite", "idempotency_key", "profile", "order", "cache"}
)
"""Fields that do not change what is computed: a job may be resumed under other values of them."""


_LATER = frozenset({"limit", "sample", "request_timeout"})
_MOST = 2**63 - 1


class JobSpec(BaseModel):
    """Everything that says what a job computes and where to put it. Immutable, and complete: same spec, same work."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    input: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files, globs or directories of Parquet, JSONL, CSV or Arrow IPC, on anything that fsspec reads."""
    output: Annotated[str, Field(min_length=1)]
    """Directory for ``data/``, ``_manifest.json`` and ``_SUCCESS``."""
    model: Annotated[str, Field(min_length=1)]
    """A registered name, a model directory, a ``.onnx`` file, or ``fake``."""
    task: Task
    engine: Annotated[str, Field(min_length=1)] = "auto"
    engine_options: dict[str, Any] = {}
    """The engine's own options (vLLM's ``EngineArgs``; ONNX Runtime's providers and session options)."""

    prompt: str | None = None
    """``generate``: a template over the input columns, ``"Say: {text}"``. ``chat``: the one user message."""
    prompt_token_column: str | None = None
    """``generate``: a column of lists of token ids, in place of ``prompt``; nothing is added to them."""
    messages: tuple[Message, ...] | None = None
    """``chat``: templates over the input columns."""
    column: str | None = None
    """The text column of embed, classify and score; for ``chat`` a column that holds the messages."""
    pair_column: str | None = None
    """``classify`` and ``score``: the second text of a pair."""
    inputs: dict[str, str] | None = None
    """``tensor``: graph input → column, where the names differ."""
    sampling: dict[str, Any] = {}
    """vLLM's own sampling parameters, by their own names."""
    sampling_columns: dict[str, str] = {}
    """Sampling parameter → column with a value for each row; where it is null, that of ``sampling`` stands."""
    chat_template_kwargs: dict[str, Any] = {}
    """``chat``: handed to the chat template, beside the messages."""
    tools: tuple[dict[str, Any], ...] = ()
    """``chat``: functions that the model may call, as OpenAI's API describes them; the chat template writes them."""
    image_column: str | None = None
    """``generate`` and ``chat``, for multimodal models: a column of images, as bytes, URIs below the operator's
    ``uri_prefixes``, ``struct<bytes, path>``, or lists of these."""
    audio_column: str | None = None
    """``generate`` and ``chat``, for models that hear: a column of sounds, as bytes, URIs, ``struct<bytes, path>``,
    lists of numbers (one channel, between -1 and 1), ``struct<array, sampling_rate>``, or lists of these."""
    audio_sampling_rate: Annotated[int, Field(ge=1_000, le=768_000)] | None = None
    """Of an ``audio_column`` of numbers, in Hz."""
    video_column: str | None = None
    """``generate`` and ``chat``, for models that see videos: a column of one video in each row, as bytes, URIs or
    ``struct<bytes, path>``; or of lists of images, which are its frames."""
    video_frame_rate: Annotated[float, Field(gt=0, le=1_000)] | None = None
    """Of a ``video_column`` of frames, a second; ``None`` is 1."""
    adapters: dict[str, str] = {}
    """LoRA adapters: name → directory. A single one serves every row, unless ``adapter_column`` is given."""
    adapter_column: str | None = None
    """A column with the adapter's name for each row; where it is null, the model alone answers."""
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """``embed``; ``auto`` reads the model's own configuration."""
    normalize: bool | None = None
    """``embed``: scale to unit length; ``None`` reads the model's own configuration."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """``embed``: keep so many numbers of each vector, for models trained for it (Matryoshka); ``None`` keeps all."""
    embedding_type: Literal["float32", "int8", "binary"] | None = None
    """``embed``: ``int8`` is 127 times a unit vector, rounded; ``binary`` the signs, eight to a byte."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """``classify``: the best so many labels in ``scores``, best first; ``None``: all, in the model's order."""
    overlong: Literal["auto", "error", "truncate", "split"] = "auto"
    """Text past the model's limit: ``auto`` is an error for generate and chat, truncation (counted) elsewhere;
    ``split`` (``embed``) averages the vectors of its pieces, each with the weight of its tokens."""

    order: Literal["auto", "input", "prefix"] = "auto"
    """``generate`` and ``chat``: which rows of a shard run first. ``auto``: those whose prompts begin alike together,
    and among them the longest expected answers first, as far as rows have been read; ``prefix``: the same, but as many
    are read first as settings allow, and rows are dealt out to shards by what their prompts begin with (they are copied
    for that, on disk); ``input``: as they come. The output is in input order whatever this says."""
    cache: Literal["off", "on", "sampled"] = "off"
    """Keep the answers, for this tenant's later jobs with the same model, parameters and prompts, and take those that
    are there (engine ``vllm``). ``on`` (or ``true``): where the prompt settles the answer, by temperature 0 or a seed;
    ``sampled``: answers that are drawn at random too, so that the same ones come again."""
    limit: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    """Compute only the first so many rows of the input, as a job of its own."""
    sample: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    """Compute only so many rows, spread evenly over the input: the same ones each time."""
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds that a row may spend inside the engine (``vllm``): one that takes longer is aborted and fails."""
    keep_columns: tuple[str, ...] | None = None
    """Input columns copied to the output; ``None`` keeps all."""
    output_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*$")] = ""
    """Put before every result column's name."""
    shard_rows: Annotated[int, Field(ge=1)] = 50_000
    """Most rows in a shard."""
    shard_bytes: Annotated[int, Field(ge=1)] = 256 * 2**20
    """Most uncompressed input bytes in a shard, estimated from the footers."""
    max_failed_rows: Annotated[int, Field(ge=0)] | None = None
    """The job is stopped as failed when more rows than this have failed."""

    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "default"
    idempotency_key: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    metadata: dict[str, str] = {}
    completion_window: str = "24h"
    overwrite: bool = False
    profile: bool = False
    """Write a trace of each shard's beginning to ``<output>/_profile``, and its time by operator into the attempt's
    stats (engine ``onnx``)."""

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

    @field_validator("input", "output")
    @classmethod
    def _plain_paths(cls, value: Any) -> Any:
        for uri in value if isinstance(value, tuple) else (value,):
            _refuse_credentials(uri)
            if not uri.strip():
                raise ValueError("the path is empty; '.' is the working directory")
            if _NOWHERE.match(uri):
                raise ValueError(f"{uri!r} names no bucket or folder")
            if "::" in uri:
                raise ValueError(f"{uri!r} chains filesystems with '::', which is refused; give one plain path or URL")
        return value

    @field_validator("model", "adapters")
    @classmethod
    def _no_credentials(cls, value: Any) -> Any:
        for uri in value.values() if isinstance(value, dict) else (value,):
            _refuse_credentials(uri)
        return value

    @field_validator("engine_options", "sampling", "chat_template_kwargs", "tools")
    @classmethod
    def _plain_json(cls, value: Any) -> Any:
        # Stored as JSON, where an infinity would silently become null.
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"must be plain JSON: {error}") from None
        return value

    @field_validator("completion_window")
    @classmethod
    def _a_duration(cls, value: str) -> str:
        duration_seconds(value)
        return value

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
        given = {name for name in _SHAPING if getattr(self, name) not in (None, {}, ())}
        if extra := sorted(given - allowed):
            reads = ", ".join(sorted(allowed))
            raise ValueError(f"task '{task}' does not read {', '.join(extra)}; it reads {reads}")
        if task is Task.GENERATE and [self.prompt, self.prompt_token_column].count(None) != 1:
            raise ValueError(
                "task 'generate' needs prompt, a template over the columns, such as \"Say: {text}\" "
                "(or prompt_token_column, and never both)"
            )
        if task is Task.CHAT and [self.prompt, self.messages, self.column].count(None) != 2:
            raise ValueError("task 'chat' needs exactly one of messages, prompt and column")
        if self.limit is not None and self.sample is not None:
            raise ValueError("limit and sample exclude each other: the first rows, or some from everywhere")
        if self.overlong == "split" and task is not Task.EMBED:
            raise ValueError(f"overlong 'split' averages embeddings; task '{task}' has none")
        if task in (Task.EMBED, Task.CLASSIFY, Task.SCORE) and self.column is None:
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

    def work_hash(self) -> str:
        """SHA-256 (hex) of the fields that decide what is computed: two specs that agree may share one job."""
        work = {k: v for k, v in self.model_dump(mode="json").items() if k not in NOT_PART_OF_THE_WORK}
        # Jobs of versions that did not know these fields go on.
        work = {k: v for k, v in work.items() if k not in _LATER or v is not None}
        if self.sampling.get("structured_outputs"):
            # The properties of a JSON Schema are answered in its order, which sorting would hide.
            work["form"] = json.dumps(self.sampling["structured_outputs"])
        if self.tools:
            # They are in the prompt, as they were written.
            work["tools"] = json.dumps(work["tools"])
        return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()


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
    Task.EMBED: frozenset({"column", "dimensions", "embedding_type"}),
    Task.CLASSIFY: frozenset({"column", "pair_column", "top_k"}),
    Task.SCORE: frozenset({"column", "pair_column"}),
    Task.TENSOR: frozenset({"inputs"}),
}
_SHAPING = frozenset().union(*_READS.values())
"""Fields that only some tasks read."""


def _refuse_credentials(uri: str) -> None:
    # A job is stored, shown and listed. Its text is not repeated here either.
    if holds_credentials(uri):
        scheme = uri.partition("://")[0].lower()
        raise ValueError(
            f"the {scheme}:// URL holds a password or a key, and a job is no place for one: leave it out of the URL, "
            f"and set storage_options.{scheme} (ROWMILL_STORAGE_OPTIONS)"
        )


_SAY_ENOUGH = ("extra_forbidden", "missing", "value_error")


def parse(fields: dict[str, Any]) -> JobSpec:
    """A spec from keyword arguments, or :class:`InvalidJob` naming every field at fault and why."""
    try:
        return JobSpec(**fields)
    except ValidationError as error:
        raise invalid(error) from None


def invalid(error: ValidationError) -> InvalidJob:
    """What pydantic found, as the error that names every field at fault and why."""
    problems = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        what = item["msg"].removeprefix("Value error, ")
        if item["type"] not in _SAY_ENOUGH and isinstance(item["input"], (str, int, float)):
            what += f", not {textwrap.shorten(repr(item['input']), 100)}"
        problems.append((where, "unknown field" if item["type"] == "extra_forbidden" else what))
    first = problems[0][0] or None
    if len(problems) == 1:
        return InvalidJob(problems[0][1], field=first)
    found = InvalidJob("; ".join(f"{where}: {what}" if where else what for where, what in problems))
    found.field = first
    return found
