"""Pure: ``engine_options`` of the ONNX Runtime engine, validated."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.spec.values import RowSeconds
from storage.errors import InvalidJob

Provider = tuple[str, dict[str, str]]
PROVIDERS = frozenset(
    f"{name}ExecutionProvider"
    for name in (
        *("ACL", "ArmNN", "Azure", "CANN", "CoreML", "CPU", "CUDA", "Dml", "Dnnl", "Js", "MIGraphX", "Nnapi"),
        *("NvTensorRTRTX", "OpenVINO", "QNN", "Rknpu", "ROCM", "Tensorrt", "VitisAI", "VSINPU", "WebGpu", "WebNN"),
        "Xnnpack",
    )
)
"""Every execution provider that a build of ONNX Runtime may have. Static, because the machine that submits a job may
not have ONNX Runtime; a test holds it against the installed release."""


class StateInput(BaseModel):
    """Where an input's state comes from, and the shape of the zeros that each sequence begins with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: str
    shape: tuple[Annotated[StrictInt, Field(ge=0, le=2**31)], ...] | None = None


class OnnxOptions(BaseModel):
    """How ONNX Runtime runs the graph. ``None``: what ``rowmill model benchmark`` found fastest; unmeasured, what the
    machine suggests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    providers: tuple[Provider, ...] | None = None
    """Execution providers, best first: names or ``[name, {option: value}]``; ``None``: CUDA if it works, else CPU."""
    allow_fallback: StrictBool = False
    """Go on when a provider that was named is not active, instead of refusing."""
    file: str | None = None
    """Which ``.onnx`` file of the model directory, relative to it."""
    sessions: Annotated[StrictInt, Field(ge=1, le=256)] | None = None
    """Copies of the model. One copy serves several batches at once (``lanes``)."""
    lanes: Annotated[StrictInt, Field(ge=1, le=256)] | None = None
    """Batches that run side by side on each copy."""
    threads: Annotated[StrictInt, Field(ge=1, le=1024)] | None = None
    """Threads that share the work of each batch (``intra_op_num_threads`` is another name for it)."""
    io_binding: StrictBool | None = None
    """Texts: run into kept input and output buffers instead of new ones; ``None``: on a GPU only."""
    keep_optimized: StrictBool = True
    """On CPU, keep the graph as ONNX Runtime optimized it, and its packed weights, in the cache (up to twice the
    model's size): it loads in less than half of the time, and all sessions on a machine share the memory."""
    autotune: StrictBool = True
    """Take what ``rowmill model benchmark`` found fastest on this machine for what is ``None`` here."""
    token_budget: Annotated[StrictInt, Field(ge=1)] | None = None
    """Most padded tokens in a batch of texts; unless measured, 512 on CPU, 16,384 on a GPU."""
    max_batch: Annotated[StrictInt, Field(ge=1)] = 256
    """Most rows in a batch."""
    window_rows: Annotated[StrictInt, Field(ge=1)] = 32_768
    """Most rows looked at together when texts are sorted by length and duplicates found; 32 MiB of columns at most.
    Two such windows are in memory at a time."""
    row_mode: Literal["auto", "stack", "whole"] = "auto"
    """``tensor``: is a row one item along the graph's first axis, or the whole input? ``auto`` reads the graph, and the
    types of the columns where it leaves both open."""
    masks: dict[str, str] = {}
    """``tensor``: the name that the graph gives an axis → its input, [rows, axis], that is 1 where the axis is real:
    rows of different size run together, padded with their last element, and outputs with that axis are cut. The mask
    is made here where the rows have no column for it. Without it, rows of one shape run together."""
    state: dict[str, str | StateInput] = {}
    """``tensor``: graph input → the output that it gets from the row before, in the sequence that the job's field
    ``sequence`` names. A sequence begins with zeros; ``{"output": NAME, "shape": [2, 1, 128]}`` says of which shape
    where the graph leaves it open. Such inputs read no column, such outputs make none, and rows run one by one."""
    labels: tuple[str, ...] | None = None
    """``classify``: the names of the classes, in the graph's order, in place of those in ``config.json``."""
    row_timeout: RowSeconds | None = None
    """Seconds that a run may take: a batch that takes longer is halved, down to the row that does."""
    finite: StrictBool = False
    """``tensor``: a NaN or an infinity in a row is that row's error."""
    graph_optimization_level: Literal["disable", "basic", "extended", "layout", "all"] = "all"
    """ONNX Runtime's own graph optimizations."""
    custom_ops: tuple[str, ...] = ()
    """Libraries of custom operators, by path: only those that the setting ``custom_op_paths`` names."""
    session_config: dict[str, str] = {}
    """``SessionOptions.add_session_config_entry``: key → value. Where quantized graphs would be clipped,
    ``session.x64quantprecision`` is ``1`` unless given."""

    @field_validator("providers", mode="before")
    @classmethod
    def _names_and_pairs(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str) or not isinstance(value, list | tuple) or not value:
            raise ValueError('a list of provider names or of [name, {option: value}], such as ["CPUExecutionProvider"]')
        pairs: list[Provider] = []
        for item in value:
            match item:
                case str():
                    pairs.append((item, {}))
                case [str() as name, Mapping() as options]:
                    pairs.append((name, {str(k): str(v) for k, v in options.items()}))
                case _:
                    raise ValueError(f"{item!r} is neither a provider's name nor [name, {{option: value}}]")
        names = [name for name, _ in pairs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{', '.join(sorted(twice))} is named twice")
        for name, options in pairs:
            _no_paths(options, f"provider {name}")
        if unknown := sorted(set(names) - PROVIDERS):
            near = difflib.get_close_matches(unknown[0], PROVIDERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(PROVIDERS))}"
            raise ValueError(f"no build of ONNX Runtime has {', '.join(map(repr, unknown))}; {hint}")
        return tuple(pairs)

    @model_validator(mode="after")
    def _state_in_one_lane(self) -> OnnxOptions:
        if self.state and (self.sessions or 1) * (self.lanes or 1) > 1:
            raise ValueError("with 'state' rows run one after the other; leave out 'sessions' and 'lanes'")
        if self.state and self.masks:
            raise ValueError("with 'state' rows run one by one, and none is padded; leave out 'masks'")
        return self

    @field_validator("session_config", mode="before")
    @classmethod
    def _strings(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(v, str | int | float) for v in value.values()):
            raise ValueError('a mapping of string to string, such as {"session.dynamic_block_base": "4"}')
        entries = {str(key): str(entry) for key, entry in value.items()}
        _no_paths(entries, "session_config")
        return entries

    @field_validator("file")
    @classmethod
    def _inside_the_directory(cls, value: str | None) -> str | None:
        if value is not None:
            path = PurePosixPath(value)
            if path.is_absolute() or ".." in path.parts or "\\" in value:
                raise ValueError(f"{value!r} leaves the model directory; give a path in it, such as onnx/model.onnx")
            if path.suffix != ".onnx":
                raise ValueError(f"{value!r} is not a .onnx file")
        return value

    def graph(self, folder: Path) -> Path | None:
        """The graph that ``file`` names in ``folder``, or ``None`` when the choice is left open.

        Raises :class:`~storage.errors.InvalidJob` when there is no such file.
        """
        if self.file is None:
            return None
        path = folder / self.file
        if not path.is_file():
            raise InvalidJob(f"the model directory {folder} has no {self.file}", field="engine_options.file")
        return path


_FILE_WORDS = frozenset({"dir", "lib", "libs", "config", "folder"})
_FILE_PARTS = ("path", "file", "directory", "library", "prefix", "package", "plugin", "gpu_external", "compute_stream")


def _no_paths(options: Mapping[str, str], where: str) -> None:
    """Refuse entries that make the runtime read, write or load files anywhere, or call what lies at an address: a job
    may name nothing outside its model directory."""
    if named := sorted(key for key in options if _names_a_file(key)):
        raise ValueError(f"{where}: {', '.join(named)} names a file or an address, which a job may not")
    if led := sorted(key for key, value in options.items() if any(part in value for part in ("/", "\\", ".."))):
        raise ValueError(f"{where}: the value of {', '.join(led)} looks like a path, which a job may not give")


def _names_a_file(key: str) -> bool:
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", key)}
    text = key.lower().replace("profile", "")  # such as trt_profile_min_shapes
    return bool(words & _FILE_WORDS) or any(part in text for part in _FILE_PARTS)


_ALIASES = {"intra_op_num_threads": "threads"}


def parse(options: Mapping[str, Any]) -> OnnxOptions:
    """Validated options, or :class:`~storage.errors.InvalidJob` naming the first option at fault and why."""
    fields: dict[str, Any] = {}
    for key, value in options.items():
        name = _ALIASES.get(key, key)
        if name in fields:
            raise InvalidJob(f"the same option as {name}; give one of them", field=f"engine_options.{key}")
        fields[name] = value
    try:
        parsed = OnnxOptions(**fields)
        # A row waits for the one before it, so that more lanes would not help.
        one = {"sessions": 1, "lanes": 1, "autotune": False}
        return parsed.model_copy(update=one) if parsed.state else parsed
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted([*OnnxOptions.model_fields, *_ALIASES]))
            what = f"unknown option of engine 'onnx'; it has {known}"
        else:
            what = f"{first['msg'].removeprefix('Value error, ')} (given: {first['input']!r})"
        raise InvalidJob(what, field=f"engine_options.{where}") from None
