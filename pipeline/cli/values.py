"""From words on the command line to the fields of a job. Pure, except for reading ``--spec``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.spec import json_text
from storage.errors import InvalidInput, InvalidJob, InvalidSettings
from storage.objects.local_files import read_given

_REQUIRED = {"input": "INPUT", "output": "-o/--output", "model": "-m/--model", "task": "-t/--task"}
_MERGED = (
    "sampling",
    "sampling_columns",
    "engine_options",
    "metadata",
    "inputs",
    "chat_template_kwargs",
    "adapters",
)
"""Fields whose flags add to the ``--spec`` file's keys; every other flag replaces the file's value."""


def value_of(text: str) -> Any:
    """JSON where it is JSON (numbers, ``true``, ``null``, lists, objects, quoted strings), else the text itself."""
    try:
        # NaN and Infinity are not JSON: they stay text.
        return json_text.loads(text, constants=False)
    except json_text.TooDeep as error:
        raise InvalidJob(f"a value on the command line is {error}") from None
    except ValueError:
        return text


def key_values(items: Iterable[str], option: str, *, literal: bool = False) -> dict[str, Any]:
    """``["a=1", "b=x"]`` → ``{"a": 1, "b": "x"}``; with ``literal`` every value stays text.

    Raises :class:`InvalidJob` for an item without ``=``, an empty key, or a key given twice.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise InvalidJob(f"{item!r} is not KEY=VALUE", field=option)
        if key in found:
            raise InvalidJob(f"{key!r} is given twice", field=option)
        found[key] = text if literal else value_of(text)
    return found


def moment(text: str, option: str, now: float) -> float:
    """A time in Unix seconds: ``"2026-11-30"``, ``"2026-11-30T12:00+01:00"`` (local time without an offset), or how
    long before ``now``: ``"90m"``, ``"24h"``, ``"7d"``. Raises :class:`InvalidJob` for anything else."""
    from pipeline.spec.job_spec import duration_seconds

    try:
        return now - duration_seconds(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        what = f"{text!r} is no time; write a date (2026-11-30, 2026-11-30T12:00) or how long ago (90m, 24h, 7d)"
        raise InvalidJob(what, field=option) from None


def messages(items: Iterable[str]) -> list[dict[str, str]]:
    """``["system=Be brief.", "user={text}"]`` → chat messages, in order. Raises :class:`InvalidJob`."""
    found = []
    for item in items:
        role, equals, template = item.partition("=")
        if not equals:
            raise InvalidJob(f"{item!r} is not ROLE=TEMPLATE", field="--message")
        found.append({"role": role, "content": template})
    return found


def setting_values(items: Iterable[str]) -> dict[str, Any]:
    """``["flush_rows=10", "storage_options.s3.anon=true"]`` → nested values. Raises :class:`InvalidSettings`."""
    from pipeline.config.sources import text_or_json

    found: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        first, *inner = key.strip().split(".")
        path = [first.replace("-", "_"), *inner]
        if not equals or not all(path):
            raise InvalidSettings(f"{item!r} is not KEY=VALUE", source="--setting")
        level = found
        for part in path[:-1]:
            level = level.setdefault(part, {})
            if not isinstance(level, dict):
                raise InvalidSettings(f"{item!r} goes below a value given before", source="--setting")
        level[path[-1]] = text_or_json(text)
    try:
        json_text.check_depth(found)
    except json_text.TooDeep as error:
        raise InvalidSettings(f"a value is {error}", source="--setting") from None
    return found


def with_schema(sampling: dict[str, Any] | None, schema: Path | None) -> dict[str, Any] | None:
    """The sampling parameters with the JSON Schema of ``--schema``. Raises :class:`InvalidJob` where both hold one."""
    if schema is None:
        return sampling
    if "structured_outputs" in (sampling or {}):
        raise InvalidJob("--schema and --sampling structured_outputs=… exclude each other", field="--schema")
    return {**(sampling or {}), "structured_outputs": {"json": json_file(schema, "--schema")}}


def json_file(path: Path, option: str) -> Any:
    """What a JSON file holds. Raises :class:`InvalidJob`: missing, unreadable, not JSON."""
    try:
        return json_text.loads(_read(path, option), constants=False)
    except ValueError as error:
        raise InvalidJob(f"{path} is not valid JSON: {error}", field=option) from None


def _read(path: Path, option: str) -> bytes:
    try:
        return read_given(path)
    except InvalidInput as error:
        raise InvalidJob(error.message, field=option) from None
    except FileNotFoundError:
        raise InvalidJob(f"no such file: {path}", field=option) from None
    except OSError as error:
        raise InvalidJob(f"{path} cannot be read: {error.strerror}", field=option) from None


def spec_file(path: Path, option: str = "--spec") -> dict[str, Any]:
    """The fields in a ``.toml`` or ``.json`` file. Raises :class:`InvalidJob`: missing, unreadable, not a table."""
    data = _read(path, option)
    toml = path.suffix.lower() == ".toml"
    try:
        fields = json_text.loads_toml(data.decode()) if toml else json_text.loads(data)
    except ValueError as error:
        raise InvalidJob(f"{path} is not valid {'TOML' if toml else 'JSON'}: {error}", field=option) from None
    if not isinstance(fields, dict):
        raise InvalidJob(f"{path} holds a {type(fields).__name__}, not an object of job fields", field=option)
    return fields


def job_fields(from_file: Mapping[str, Any], from_flags: Mapping[str, Any]) -> dict[str, Any]:
    """The job's fields: flags over the file, key by key for sampling, engine options, metadata and inputs.

    Flags that were not given are ``None`` and say nothing. Raises :class:`InvalidJob` for what no job can lack.
    """
    from pipeline.spec.job_spec import JobSpec

    fields = dict(from_file)
    for name, value in from_flags.items():
        if value is None:
            continue
        below = fields.get(name)
        fields[name] = {**below, **value} if name in _MERGED and isinstance(below, Mapping) else value
    if unknown := sorted(fields.keys() - JobSpec.model_fields.keys()):
        near = difflib.get_close_matches(unknown[0], JobSpec.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidJob(f"unknown field{hint}", field=unknown[0])
    missing = [option for name, option in _REQUIRED.items() if fields.get(name) in (None, "", [], ())]
    # An input may say its task itself: whoever reads it decides.
    if missing and missing != [_REQUIRED["task"]]:
        raise InvalidJob(f"missing {', '.join(missing)}; see --help")
    return fields
