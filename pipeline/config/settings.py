"""Settings: the only reader of the environment. Flag > ``ROWMILL_*`` > ``rowmill.toml`` > user config > default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pipeline.config import sources
from pipeline.spec import job_spec, json_text
from storage import redaction, urls
from storage.errors import InvalidSettings
from storage.records import LONGEST_POSTPONEMENT_SECONDS

LogLevel = Literal["debug", "info", "warning", "error", "critical"]


def _expanded(value: object) -> object:
    if "\0" in str(value):
        raise ValueError("a path cannot contain a NUL character")
    # pathlib's own raises RuntimeError for the home of nobody.
    return Path(os.path.expanduser(value)) if isinstance(value, (str, Path)) else value  # noqa: PTH111


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _without_credentials(value: str) -> str:
    if redaction.holds_credentials(value):
        raise ValueError("the URL holds a password or a key: leave it out, and set storage_options")
    return value


def _database(value: str) -> str:
    urls.database_url(value)
    return value


def _window(value: str) -> str:
    job_spec.bounded(value)
    return value


class Settings(BaseSettings):
    """How this process runs. Frozen; jobs never carry any of it.

    Raises :class:`~storage.errors.InvalidSettings`, which names the field and the source of a bad value.
    """

    model_config = SettingsConfigDict(
        env_prefix=sources.PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    data_dir: Annotated[Path, BeforeValidator(_expanded)] = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("rowmill"))
    )
    """Where the embedded database lives."""
    cache_dir: Annotated[Path, BeforeValidator(_expanded)] = Field(
        default_factory=lambda: Path(platformdirs.user_cache_dir("rowmill"))
    )
    """Exported graphs, model digests: all of it can be deleted."""
    database_url: Annotated[Annotated[str, AfterValidator(_database)] | None, Field(repr=False)] = None
    """SQLAlchemy URL; ``None`` is SQLite at ``data_dir/rowmill.db``."""
    broker_url: Annotated[Annotated[str, AfterValidator(urls.broker_url)] | None, Field(repr=False)] = None
    """Celery broker URL; ``None`` is the embedded mode."""
    storage_options: Annotated[dict[str, dict[str, Any]], Field(repr=False)] = {}
    """Per protocol, fsspec's own options: ``{"s3": {"endpoint_url": …}}``."""
    uri_prefixes: tuple[Annotated[str, Field(min_length=1), AfterValidator(_without_credentials)], ...] = ()
    """Places below which a row may name a file (an image by URI): folders, buckets. None are allowed by default."""
    custom_op_paths: tuple[Annotated[Path, BeforeValidator(_expanded)], ...] = ()
    """Libraries of custom ONNX operators that jobs may load: files, each by its path. They run in the worker."""
    allowed_engine_options: tuple[str, ...] = ()
    """Engine options that jobs may set although they run code, open connections or name files of the worker. Each
    engine says which of its own need this; vLLM: ``trust_remote_code``, ``worker_cls``, …, and in a fleet also
    ``tokenizer``. In a fleet ``adapters``, a field of the job, needs it too."""
    lease_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A worker silent for this long may lose its shards. Heartbeats come at a third of it."""
    flush_rows: Annotated[int, Field(ge=1)] = 8192
    """Most finished rows that a crash can cost. Half as many make a resume point, while the other half gathers. Where
    it is not set, rows that took no more than five seconds make none: a crash can cost these five seconds."""
    flush_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Finished rows are flushed at least this often."""
    flush_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    """Finished rows are flushed when their results take this much memory. Up to two such buffers exist per shard."""
    slots: Annotated[int, Field(ge=1, le=64)] = 1
    """Shards that run at the same time in one process, on the same engine. Where it is not set, an embedded job on vLLM
    runs two, so that the engine's batch does not drain between them, and so does a worker."""
    max_engines: Annotated[int, Field(ge=1)] = 1
    """Engines that a process keeps loaded; the one used longest ago goes first."""
    engine_memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """Most resident host memory of loaded engines: idle ones beyond it are closed. ``None``: only ``max_engines``."""
    drain_grace_seconds: Annotated[float, Field(ge=0)] = 20.0
    """A worker that was asked to end lets its shards run on this long; then it flushes and hands them back."""
    read_batch_rows: Annotated[int, Field(ge=1)] = 1024
    """Most rows read at a time. Where it is not set, engines whose rows are small take more of them at a time."""
    read_batch_bytes: Annotated[int, Field(ge=1)] = 16 * 2**20
    """Most uncompressed bytes read at a time, estimated from the footers."""
    read_ahead_bytes: Annotated[int, Field(ge=0)] = 32 * 2**20
    """Uncompressed bytes that are read ahead of the engine, per shard; one batch in any case."""
    order_rows: Annotated[int, Field(ge=1)] = 16_384
    """Most rows of a shard whose prompts are held to be put in order (vLLM), and most rows in a shard that was made by
    ``order="prefix"``."""
    order_bytes: Annotated[int, Field(ge=1)] = 256 * 2**20
    """Most memory for these prompts, and for rows that are dealt out to shards."""
    result_cache: Annotated[str, AfterValidator(_without_credentials)] | None = None
    """Where answers are kept for later jobs (``cache`` of a job): a folder, or a URL that all workers reach. ``None``
    is ``results`` below ``cache_dir``, where each machine has its own."""
    result_cache_days: Annotated[float, Field(gt=0)] = 30.0
    """``rowmill admin gc`` deletes answers that are older."""
    result_cache_bytes: Annotated[int, Field(ge=0)] | None = None
    """``rowmill admin gc`` deletes the oldest cached results beyond this many bytes. ``None``: no limit."""
    result_index_bytes: Annotated[int, Field(ge=16)] = 256 * 2**20
    """Most memory to know by heart which answers there are, at 16 bytes an answer: the newest are known."""
    attempt_retention_hours: Annotated[float, Field(ge=0)] = 24.0
    """How long the files of ended attempts are kept outside the embedded mode."""
    job_retention_days: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Jobs that ended longer ago are deleted with their work files, by beat and ``rowmill admin gc``; what they
    published stays. ``None``: they stay until ``rowmill job delete``."""
    map_dir: Annotated[str, AfterValidator(_without_credentials)] | None = None
    """Where ``client.map`` keeps rows and results: a folder, or a URL. ``None`` is ``map`` below ``data_dir``. In a
    fleet it has to be set, to a place that all workers reach."""
    map_retention_days: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 7.0
    """Rows of ``client.map``, with their results and jobs, that no call has used for so long are deleted by the next
    call of it."""
    files_dir: Annotated[str, AfterValidator(_without_credentials)] | None = None
    """Where the gateway keeps uploaded files and the output of batches: a folder, or a URL. ``None`` is ``files`` below
    ``data_dir``. In a fleet it has to be set, to a place that all gateways and workers reach."""
    completion_windows: Annotated[tuple[Annotated[str, AfterValidator(_window)], ...], Field(min_length=1)] = ("24h",)
    """What a batch of the gateway may say as its ``completion_window``."""
    max_batch_requests: Annotated[int, Field(ge=1)] = 10_000_000
    """Most lines of a batch's file."""
    max_file_bytes: Annotated[int, Field(ge=1)] = 100 * 2**30
    """Largest file that the gateway takes."""
    max_line_bytes: Annotated[int, Field(ge=1)] = 256 * 2**20
    """Longest line of a batch's file."""
    batch_flush_seconds: Annotated[float, Field(gt=0)] = 1.0
    """Finished requests (jobs with a ``request_column``, batches) are flushed at least this often, so that counts move
    while they run. The smaller of this and ``flush_seconds`` counts."""
    max_failures: Annotated[int, Field(ge=1)] = 4
    """Failures after which a shard is not tried again: it has failed."""
    max_losses: Annotated[int, Field(ge=1)] = 8
    """Attempts lost in a row without progress, after which a shard is not tried again: it has failed."""
    unknown_tenants: Literal["create", "refuse"] = "create"
    """What the first job of a tenant that nobody has registered does: make it, without limits, or be refused."""
    poll_seconds: Annotated[float, Field(gt=0)] = 5.0
    """How long an idle worker waits at most before it looks for work in the database although no message came."""
    tick_seconds: Annotated[float, Field(gt=0)] = 15.0
    """How often beat has lost messages, lost shards, expired jobs and garbage looked after."""
    job_uri_prefixes: tuple[Annotated[str, Field(min_length=1), AfterValidator(_without_credentials)], ...] = ()
    """Places below which jobs that come over HTTP may read and write: folders, buckets. ``{tenant}`` in one stands for
    the tenant of the caller's key. None are allowed by default."""
    api_auth: Literal["keys", "off"] = "keys"
    """Whether the gateway asks for API keys. ``off`` only on a loopback address with ``rowmill serve --embedded``;
    every caller is then the tenant ``default`` with all scopes."""
    log_level: Annotated[LogLevel, BeforeValidator(_lower)] = "warning"
    """``debug``, ``info``, ``warning``, ``error`` or ``critical``; to standard error."""
    log_format: Literal["console", "json"] = "console"
    """``console`` for people, or ``json``: one object a line, with an ``action`` and the ids of job, shard, attempt and
    worker (logs.md). For ``rowmill worker start``, ``serve`` and ``beat`` that is then all of standard error."""

    @property
    def effective_database_url(self) -> str:
        if self.database_url is not None:
            return self.database_url
        path = str(self.data_dir / "rowmill.db").replace("%", "%25").replace("?", "%3F")
        return f"sqlite:///{path}"

    @property
    def copy_batch_rows(self) -> int:
        """Most rows at a time where they are only copied, and bytes are the limit that counts."""
        return self.read_batch_rows if "read_batch_rows" in self.model_fields_set else 65_536

    @property
    def again_seconds(self) -> float:
        """How long a job waits that could not be planned, or not be published: one lease at most."""
        return min(LONGEST_POSTPONEMENT_SECONDS, self.lease_seconds)

    @property
    def effective_result_cache(self) -> str:
        return self.result_cache or str(self.cache_dir / "results")

    @property
    def effective_map_dir(self) -> str:
        return (self.map_dir or str(self.data_dir.absolute() / "map")).rstrip("/")

    @property
    def effective_files_dir(self) -> str:
        return (self.files_dir or str(self.data_dir.absolute() / "files")).rstrip("/")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Strongest first: arguments (flags), environment, the project's file, the user's file."""
        project, user = sources.config_files()
        return (
            init_settings,
            sources.EnvSource(settings_cls),
            sources.FileSource(settings_cls, project),
            sources.FileSource(settings_cls, user),
        )

    @field_validator("*", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        json_text.check_depth(value)
        json_text.check_text(value)
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _a_bad_value_names_its_source(cls, data: Any, handler: ModelWrapValidatorHandler[Settings]) -> Settings:
        redaction.remember(sources.secret_variables())
        if isinstance(data, Mapping):
            for name in _SECRET:
                given = data.get(name)
                redaction.remember(redaction.secrets_of(given), shown=_shown(given))
        try:
            return handler(data)
        except ValidationError as error:
            raise _explained(error) from None


_SECRET = ("database_url", "broker_url", "storage_options")
"""Settings that may hold secrets: their values are never repeated, and what is secret in them is hidden everywhere."""


def _explained(error: ValidationError) -> InvalidSettings:
    """The first problem, with its field and where its value stands."""
    problem = error.errors(include_url=False)[0]
    path = tuple(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return InvalidSettings(sources.unknown_key(path[0], Settings.model_fields))
    # A flag or argument has already won the merge, so a layer is at fault only if it holds the very value refused.
    at_fault = next((x for x in sources.layers(Settings) if sources.dig(x.values, path) == problem["input"]), None)
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if path[0] not in _SECRET and problem["type"] != "value_error":
        message += f", not {problem['input']!r}"
    return InvalidSettings(message, field=".".join(path), source=at_fault.label(path) if at_fault else None)


def _shown(value: object) -> str:
    """What is no secret in a setting that holds some."""
    return redaction.redact_url(value) if isinstance(value, str) else ""


@dataclass(frozen=True, slots=True)
class Origin:
    """One value and where it comes from. ``name`` is dotted for values inside ``storage_options``; ``kind`` is
    ``flag``, ``env``, ``project``, ``user`` or ``default``, ``source`` the flag, variable or file by name."""

    name: str
    value: Any
    kind: str
    source: str


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """The settings, and how they came to be. ``flags`` maps a field to the flag that gave it."""

    settings: Settings
    origins: tuple[Origin, ...]
    files: tuple[sources.ConfigFile, ...]
    warnings: tuple[str, ...]


def load_settings(values: Mapping[str, Any] | None = None, flags: Mapping[str, str] | None = None) -> LoadedSettings:
    """The settings of this process, with every value's source.

    ``values`` come from flags and win; ``flags`` names, for messages, the flag behind each field. Raises
    :class:`InvalidSettings`.
    """
    values, flags = values or {}, flags or {}
    try:
        settings = Settings(**values)
    except InvalidSettings as error:
        field = (error.field or "").split(".")[0]
        if error.source is None and field in flags:
            raise InvalidSettings(error.reason, field=error.field, source=flags[field]) from None
        raise
    layers = sources.layers(Settings)
    origins = []
    for name in Settings.model_fields:
        for path, value in sources.leaves(getattr(settings, name), (name,)):
            layer = next((x for x in layers if sources.holds(x.values, path)), None)
            if sources.holds(values, path):
                kind, source = "flag", flags.get(name, name)
            elif layer is not None:
                kind, source = layer.kind, layer.label(path)
            else:
                kind = source = "default"
            origins.append(Origin(".".join(path), value, kind, source))
    warnings = tuple(sources.unknown_variables(Settings.model_fields))
    return LoadedSettings(settings, tuple(origins), sources.config_files(), warnings)
