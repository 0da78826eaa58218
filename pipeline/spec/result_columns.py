"""Checks that no two columns of an output have one name. The columns themselves are in ``answer_fields``. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipeline.spec.answer_fields import fields_of
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidJob

ERROR_COLUMN = "error"
_LEAVE_OUT = "leave them out: name the columns to copy in keep_columns (--keep)"


def known_fields(spec: JobSpec) -> list[pa.Field[Any]]:
    """Name and type of the results of generate, chat, classify and score, prefixed; none for the other tasks.

    An embedding's length and a graph's outputs are the model's to say.
    """
    return [field.with_name(spec.output_prefix + field.name) for field in fields_of(spec)]


def check_names(
    keep: Sequence[str], results: Iterable[str], prefix: str, notify: Callable[[str], None] = lambda message: None
) -> None:
    """Refuse an output in which two columns have one name. ``keep``: input columns that are copied; ``results``: the
    engine's columns, to which ``prefix`` is added.

    Raises :class:`~storage.errors.InvalidJob` with the names and a way out. ``notify`` hears of names that differ by
    letter case only.
    """
    named = [prefix + name for name in results]
    if ERROR_COLUMN in keep:
        raise InvalidJob(
            f"the input column {ERROR_COLUMN!r} has the name of a result column; {_LEAVE_OUT}", field="keep_columns"
        )
    if clash := [name for name in named if name == ERROR_COLUMN or named.count(name) > 1]:
        raise InvalidJob(
            f"the model has outputs named {_listed(clash)}, which would be two columns of one name; set another "
            "output_prefix (--output-prefix), or rename them in the model",
            field="output_prefix",
        )
    if clash := [name for name in keep if name in named]:
        raise InvalidJob(
            f"the input columns {_listed(clash)} have the names of result columns; set output_prefix "
            f"(--output-prefix), or {_LEAVE_OUT}",
            field="output_prefix",
        )
    ours = {name.casefold() for name in (*named, ERROR_COLUMN)}
    if alike := [name for name in keep if name.casefold() in ours]:
        notify(
            f"the input columns {_listed(alike)} differ from result columns by letter case only; readers that ignore "
            "it, such as DuckDB and Spark, confuse them"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(names)))
