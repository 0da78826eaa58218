"""Where settings come from: the environment and two TOML files, and which of them gave each value."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource
from pydantic_settings.exceptions import SettingsError

from pipeline.spec import json_text
from storage.errors import InvalidInput, InvalidSettings
from storage.objects.local_files import read_given

PREFIX = "ROWMILL_"
CONFIG_VARIABLE = "ROWMILL_CONFIG"
"""Names the file to read instead of ``rowmill.toml`` in the working directory."""

_SECRET_VARIABLE = re.compile(
    r"(?i)(?:SECRET|PASSWORD|PASSWD|PASSPHRASE|TOKEN|(?:ACCESS|ACCOUNT|STORAGE|API|SECRET)_?KEY|CONNECTION_STRING)$"
)
_SHORTEST_SECRET = 8
_NOT_SETTINGS = frozenset({CONFIG_VARIABLE, "ROWMILL_FAILPOINTS"})


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A settings file. ``kind`` is ``project`` or ``user``."""

    kind: str
    path: Path

    @property
    def exists(self) -> bool:
        return self.path.is_file()


@dataclass(frozen=True, slots=True)
class Layer:
    """One source's values. ``kind`` is ``env``, ``project`` or ``user``; ``path`` the file, if it is one."""

    kind: str
    values: Mapping[str, Any]
    path: Path | None = None

    def label(self, leaf: tuple[str, ...]) -> str:
        """What to call the source of ``leaf`` to a person: the variable's name, or the file's path."""
        return _variable_of(leaf) if self.path is None else str(self.path)


def config_files() -> tuple[ConfigFile, ConfigFile]:
    """The project's file, then the user's; neither has to exist, except one named by ``ROWMILL_CONFIG``.

    Raises :class:`InvalidSettings` when ``ROWMILL_CONFIG`` names no file.
    """
    named = os.environ.get(CONFIG_VARIABLE)
    project = Path(named).expanduser() if named else Path.cwd() / "rowmill.toml"
    if named and not project.exists():
        raise InvalidSettings(f"no such file: {project}", source=CONFIG_VARIABLE)
    user = Path(platformdirs.user_config_dir("rowmill")) / "config.toml"
    return ConfigFile("project", project), ConfigFile("user", user)


def read_file(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """The file's values; empty when there is no file. Raises :class:`InvalidSettings`: unreadable, unknown keys."""
    if not path.exists():
        return {}
    try:
        values = json_text.loads_toml(read_given(path).decode())
    except InvalidInput as error:
        raise InvalidSettings(error.message, source=str(path)) from None
    except ValueError as error:
        raise InvalidSettings(f"not valid TOML: {error}", source=str(path)) from None
    except OSError as error:
        raise InvalidSettings(f"cannot be read: {error.strerror}", source=str(path)) from None
    for key in values:
        if key not in set(known):
            raise InvalidSettings(unknown_key(key, known), source=str(path))
    return values


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The words for a key that is no setting, with the nearest one that is."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


class FileSource(InitSettingsSource):
    """A TOML file as a source of pydantic-settings, with unknown keys refused by name."""

    def __init__(self, settings_cls: type[BaseSettings], file: ConfigFile) -> None:
        super().__init__(settings_cls, read_file(file.path, settings_cls.model_fields))


class EnvSource(EnvSettingsSource):
    """The environment, with a value that is not JSON where JSON is needed named by its variable.

    ``true``, ``false``, and JSON lists and objects are understood inside nested values
    (``ROWMILL_STORAGE_OPTIONS__S3__ANON=false``); everything else there stays a string, since keys may be all digits.
    """

    def __call__(self) -> dict[str, Any]:
        try:
            values = super().__call__()
            json_text.check_depth(values)
            return {name: _decoded(value, (name,)) for name, value in values.items()}
        except SettingsError as error:
            names = [name for name in self.settings_cls.model_fields if f'"{name}"' in str(error)]
            field = names[0] if names else None
            source = _variable_of((field,)) if field else "the environment"
            raise InvalidSettings("not valid JSON", field=field, source=source) from None
        except (json_text.TooDeep, RecursionError):
            raise InvalidSettings(str(json_text.TooDeep()), source="the environment") from None

    def decode_complex_value(self, field_name: str, field: Any, value: Any) -> Any:
        """A variable that holds JSON."""
        return json_text.loads(value)


def secret_variables() -> list[str]:
    """The values of environment variables that hold secrets by their names: those that clients of stores read."""
    return [
        value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_SECRET
    ]


def text_or_json(text: str) -> Any:
    """``true`` and ``false``, and JSON lists and objects, as their values; everything else as the text it is."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text[:1] in ("{", "["):
        try:
            return json_text.loads(text)
        except json_text.TooDeep as error:
            raise InvalidSettings(f"a value is {error}") from None
        except ValueError:
            return text
    return text


def _decoded(value: Any, path: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _decoded(inner, (*path, str(key))) for key, inner in value.items()}
    return text_or_json(value) if len(path) > 1 and isinstance(value, str) else value


def layers(settings_cls: type[BaseSettings]) -> list[Layer]:
    """Every source below the flags, strongest first."""
    found = [Layer("env", EnvSource(settings_cls)())]
    found += [Layer(f.kind, read_file(f.path, settings_cls.model_fields), f.path) for f in config_files()]
    return found


def leaves(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    """The values inside nested mappings, each with its path; an empty mapping is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    else:
        yield path, value


_ABSENT = object()


def dig(values: object, path: tuple[str, ...]) -> object:
    """The value at ``path`` in nested mappings, or a marker that equals nothing else."""
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return _ABSENT
        values = values[key]
    return values


def holds(values: object, path: tuple[str, ...]) -> bool:
    """Whether nested mappings have a value at ``path``."""
    return dig(values, path) is not _ABSENT


def unknown_variables(known: Iterable[str]) -> list[str]:
    """A warning for every ``ROWMILL_*`` variable that no setting reads."""
    names = {name.upper() for name in known}
    warnings = []
    for variable in sorted(os.environ):
        if not variable.upper().startswith(PREFIX) or variable.upper() in _NOT_SETTINGS:
            continue
        name = variable[len(PREFIX) :].upper().split("__", 1)[0]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
            warnings.append(f"{variable} is set, but there is no such setting{hint}")
    return warnings


def _variable_of(leaf: tuple[str, ...]) -> str:
    """The variable that gave ``leaf``: the most nested name that is set, else the whole field's."""
    environment = {name.upper(): name for name in os.environ}
    for depth in range(len(leaf), 0, -1):
        name = PREFIX + "__".join(leaf[:depth]).upper()
        if name in environment:
            return environment[name]
    return PREFIX + leaf[0].upper()
