"""How a job's text files are to be read: what CSV and JSONL do not say themselves."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, field_validator

from pipeline.spec.values import Name, rule

DECIMAL = re.compile(r"decimal\(\s*([0-9]{1,2})\s*,\s*([0-9]{1,2})\s*\)")
_TYPES = ("string", "int64", "double", "bool", "date", "timestamp")


def encoding_name(name: str) -> str:
    """The codec's canonical name. Raises ``ValueError`` for a name that no codec for text has."""
    try:
        found = codecs.lookup(name).name
        "a\n".encode(found).decode(found)
    except (LookupError, ValueError, TypeError):
        raise ValueError(f"{name!r} is no encoding; for example utf-8, utf-16, latin-1, cp1252 or shift_jis") from None
    return found


def check_type(name: str) -> None:
    """Raise ``ValueError`` for what is no name of a CSV column's type."""
    match = DECIMAL.fullmatch(name)
    if name not in _TYPES and (match is None or not 1 <= int(match[1]) <= 38 or int(match[2]) > int(match[1])):
        raise ValueError(
            f"{name!r} is no type of a CSV column; there are {', '.join(_TYPES)} and decimal(PRECISION,SCALE)"
        )


def _delimiter(text: str) -> None:
    if len(text) != 1 or not text.isascii() or (not text.isprintable() and text != "\t") or text in '"\\ ':
        raise ValueError(f"{text!r} cannot separate columns; give one ASCII character, as ';', '|' or '\\t' for a tab")
    if text.isalnum():
        raise ValueError(f"{text!r} cannot separate columns, because values hold it; give a character such as ';'")


class TextFields(BaseModel):
    """The fields of a job about its text files."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    encoding: Annotated[str, rule(encoding_name)] | None = None
    """Encoding of CSV and JSONL files, such as ``latin-1``. ``None``: what the file's byte order mark says, else
    UTF-8."""
    csv_delimiter: Annotated[str, rule(_delimiter)] | None = None
    """Character between the columns of a CSV, such as ``';'``. ``None`` is a comma; a first line that holds another one
    instead is refused."""
    csv_types: Literal["auto", "text"] = "auto"
    """Types of CSV columns: auto, or text for all. ``auto``: a column whose every value comes back as written is one of
    whole numbers, numbers or dates; any other is text."""
    csv_schema: dict[Name, Annotated[str, rule(check_type)]] = {}
    """The type of a CSV column: ``string``, ``int64``, ``double``, ``bool``, ``date``, ``timestamp`` or
    ``decimal(PRECISION,SCALE)``."""

    @field_validator("csv_delimiter", mode="before")
    @classmethod
    def _a_tab_may_be_spelled(cls, value: Any) -> Any:
        return "\t" if value in ("\\t", "tab") else value


class TextSpec(Protocol):
    """The part of a job's specification that says how its text files are read."""

    @property
    def encoding(self) -> str | None: ...
    @property
    def csv_delimiter(self) -> str | None: ...
    @property
    def csv_types(self) -> str: ...
    @property
    def csv_schema(self) -> Mapping[str, str]: ...
    @property
    def request_column(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class TextOptions:
    """``wanted``: the columns that the job reads or keeps, ``None`` for all; no other is converted. ``as_json``: the
    columns of JSONL that stay JSON text, whatever their values have in common.

    ``csv_delimiter`` ``None`` is a comma, unless the first line shows that it is another.
    """

    encoding: str | None = None
    csv_delimiter: str | None = None
    csv_types: str = "auto"
    csv_schema: Mapping[str, str] = field(default_factory=dict)
    wanted: frozenset[str] | None = None
    as_json: frozenset[str] = frozenset()

    @classmethod
    def of(cls, spec: TextSpec, wanted: frozenset[str] | None) -> TextOptions:
        encoding = None if spec.encoding is None else encoding_name(spec.encoding)
        # A struct of all requests would put the fields of each, as nulls, into every other.
        as_json = frozenset() if spec.request_column is None else frozenset({spec.request_column})
        return cls(encoding, spec.csv_delimiter, spec.csv_types, spec.csv_schema, wanted, as_json)

    def wants(self, name: str) -> bool:
        return self.wanted is None or name in self.wanted
