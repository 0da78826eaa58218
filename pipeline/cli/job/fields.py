"""The options that describe a job: one for each field of :class:`JobSpec`, made from its type and its description.

A new field gets its option without a line here: ``--its-name``, with the first sentence of its description as the help.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from pipeline.cli import values
from pipeline.spec.job_spec import JobSpec, Message
from storage.errors import InvalidJob

_WORK, _ROWS, _OUT, _QUEUE = "What to compute", "Rows and shards", "Output", "Scheduling"
_IN_ORDER = (_WORK, _OUT, _ROWS, _QUEUE)
_PANELS = {
    **dict.fromkeys(("output", "keep_columns", "output_prefix", "tensor_columns", "profile", "overwrite"), _OUT),
    "openai_lines": _OUT,
    "metadata": _OUT,
    **dict.fromkeys(
        ("encoding", "csv_delimiter", "csv_types", "csv_schema", "limit", "sample", "order", "cache"), _ROWS
    ),
    **dict.fromkeys(("request_timeout", "shard_rows", "shard_bytes", "max_failed_rows", "completion_window"), _ROWS),
    **dict.fromkeys(("priority", "tenant", "idempotency_key"), _QUEUE),
}
"""Where an option stands in ``--help``; the others say what to compute."""
_NEEDED = ("model", "task", "output")
"""They stand first: no job can lack them."""
_FLAGS = {
    "model": ("-m", "--model"),
    "task": ("-t", "--task"),
    "prompt": ("-p", "--prompt"),
    "engine": ("-e", "--engine"),
    "output": ("-o", "--output"),
    "messages": ("--message",),
    "inputs": ("--input",),
    "engine_options": ("--set",),
    "sampling_columns": ("--sampling-column",),
    "adapters": ("--adapter",),
    "chat_template_kwargs": ("--chat-template-kwarg",),
    "keep_columns": ("--keep",),
    "csv_schema": ("--csv-type",),
    "cache": ("--cache/--no-cache",),
}
"""Options that are not called as their fields."""
_METAVARS = {
    "model": "MODEL",
    "engine": "ENGINE",
    "output": "DIR",
    "prompt": "TEMPLATE",
    "prefix": "TEXT",
    "prompt_name": "NAME",
    "output_prefix": "PREFIX",
    "encoding": "NAME",
    "csv_delimiter": "CHAR",
    "completion_window": "TIME",
    "tenant": "NAME",
    "idempotency_key": "KEY",
    "task": "TASK",
    "embedding_type": "TYPE",
    "sequence": "COLUMN",
    "audio_sampling_rate": "HZ",
    "video_frame_rate": "FPS",
    "request_timeout": "SECONDS",
    "keep_columns": "COLUMN",
    "endpoint": "URL",
    "inputs": "NAME=COLUMN",
    "sampling_columns": "KEY=COLUMN",
    "adapters": "NAME=DIR",
    "csv_schema": "COLUMN=TYPE",
}
"""What stands for the value in ``--help``, where its type does not say it."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """How values of one type are given: the type of the option, its metavar, and what makes the field's value of it."""

    given_as: Any
    metavar: str | None
    convert: Callable[[Any, str], Any]


def _as_given(value: Any, flag: str) -> Any:
    return value


def _kind_of(annotation: Any) -> _Kind:
    """Raises ``TypeError`` for a type that no option takes."""
    annotation = _bare(annotation)
    origin, inner = get_origin(annotation), [_bare(each) for each in get_args(annotation)]
    if origin is Literal:
        return _Kind(annotation, "HOW", _as_given)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _Kind(Literal[tuple(member.value for member in annotation)], None, _as_given)
    if annotation is bool:
        return _Kind(bool, None, _as_given)
    if annotation in (int, float):
        return _Kind(annotation, "N", _as_given)
    if annotation is str:
        return _Kind(str, "TEXT", _as_given)
    if origin is dict:
        literal = inner[1] is str
        return _Kind(list[str], "KEY=VALUE", lambda given, flag: values.key_values(given, flag, literal=literal))
    if origin is tuple and inner[0] is str:
        return _Kind(list[str], "TEXT", _as_given)
    if origin is tuple and inner[0] is Message:
        return _Kind(list[str], "ROLE=TEMPLATE", lambda given, flag: values.messages(given))
    if origin is tuple and get_origin(inner[0]) is dict:
        return _Kind(Path, "FILE", values.json_file)
    raise TypeError(f"no option takes a {annotation}")


def _bare(annotation: Any) -> Any:
    """A type without its rules, and without ``None`` beside it."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return _bare(next(each for each in get_args(annotation) if each is not type(None)))
    return annotation


def first_sentence(description: str) -> str:
    """The beginning of a field's description, up to the end of its first sentence, without markup."""
    plain = " ".join(description.replace("``", "").split())
    return re.split(r"(?<=[^.]\.)\s", plain + " ", maxsplit=1)[0].strip().rstrip(".") + "."


@dataclass(frozen=True, slots=True)
class _Option:
    """The option of one field."""

    name: str
    kind: _Kind
    flags: tuple[str, ...]

    def parameter(self) -> inspect.Parameter:
        help_text = first_sentence(JobSpec.model_fields[self.name].description or "")
        shown: dict[str, Any] = {
            "help": help_text + (" May be repeated." if get_origin(self.kind.given_as) is list else ""),
            "metavar": _METAVARS.get(self.name, "COLUMN" if self.name.endswith("column") else self.kind.metavar),
            "rich_help_panel": _PANELS.get(self.name, _WORK),
        }
        return _parameter(self.name, self.kind.given_as, typer.Option(*self.flags, **shown))

    def value(self, given: Any) -> Any:
        """The field's value; ``None`` says that the option was not given."""
        return None if given is None or given == [] else self.kind.convert(given, self.flags[-1])


def _parameter(name: str, given_as: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[given_as | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(name: str, annotation: Any) -> _Option:
    kind = _kind_of(bool if name == "cache" else annotation)
    flag = "--" + name.replace("_", "-")
    one_way = (flag,)  # "off" is what a job without the option has
    default = JobSpec.model_fields[name].default
    both = (f"{flag}/--no-{name.replace('_', '-')}",)
    return _Option(name, kind, _FLAGS.get(name, both if kind.given_as is bool and default is None else one_way))


_OPTIONS = {name: _option(name, field.annotation) for name, field in JobSpec.model_fields.items() if name != "input"}
_OPTIONS = dict(
    sorted(_OPTIONS.items(), key=lambda item: (_IN_ORDER.index(_PANELS.get(item[0], _WORK)), item[0] not in _NEEDED))
)
_INPUT = typer.Argument(
    metavar="INPUT...", help="Parquet, JSONL, CSV or Arrow files, globs or directories.", show_default=False
)
_PARAMETERS = {
    "input": _parameter("input", list[str], _INPUT),
    **{name: option.parameter() for name, option in _OPTIONS.items()},
    "schema": _parameter(
        "schema",
        Path,
        typer.Option(
            metavar="FILE", help="generate, chat: a JSON Schema that every answer follows.", rich_help_panel=_WORK
        ),
    ),
    "keep_none": _parameter(
        "keep_none", bool, typer.Option("--keep-none", help="Copy no input column.", rich_help_panel=_OUT)
    ),
    "cache_sampled": _parameter(
        "cache_sampled",
        bool,
        typer.Option("--cache-sampled", help="As --cache, also for answers drawn at random.", rich_help_panel=_ROWS),
    ),
    "spec": _parameter(
        "spec",
        Path,
        typer.Option(metavar="FILE", help="Job fields as TOML or JSON; options win over it.", rich_help_panel=_WORK),
    ),
}
"""By name: an option for each field, and four that shape a field in a way of their own."""


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """The job's fields, as the options give them. Raises :class:`InvalidJob`."""
    flags = {name: option.value(options[name]) for name, option in _OPTIONS.items()}
    flags["input"] = options["input"]
    flags["sampling"] = values.with_schema(flags["sampling"], options["schema"])
    if options["cache"] is not None:
        flags["cache"] = "on" if options["cache"] else "off"
    if options["cache_sampled"]:
        flags["cache"] = "sampled"
    if options["keep_none"]:
        if flags["keep_columns"]:
            raise InvalidJob("--keep and --keep-none exclude each other")
        flags["keep_columns"] = []
    return values.job_fields(values.spec_file(options["spec"]) if options["spec"] else {}, flags)


def with_job_fields(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Give a command the options of a job: it takes the invocation and the fields, then options of its own."""
    own = inspect.signature(function, eval_str=True)
    invocation, _, *rest = own.parameters.values()

    @functools.wraps(function)
    def wrapper(given: Any, **options: Any) -> int | None:
        fields = _fields({name: options.pop(name) for name in _PARAMETERS})
        return function(given, fields, **options)

    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*_PARAMETERS.values(), *rest)]
    wrapper.__signature__ = own.replace(parameters=[invocation, *keyword])  # type: ignore[attr-defined]
    return wrapper
