"""Rows that bring all of their own parameters, as requests of an API do: what an engine reads, and what it answers.

An engine answers such rows when it is :class:`AnswersRequests`; a job has them when ``JobSpec.request_column`` is set.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.result_columns import COUNTS, LOGPROBS
from storage.errors import RowError

PROMPT, PARAMETERS = "prompt", "parameters"
"""Columns: the prompt, and its parameters, both JSON text. Task ``chat``: a list of messages; ``generate``: text, or a
list of token ids."""
SCHEMA = pa.schema([pa.field(PROMPT, pa.string()), pa.field(PARAMETERS, pa.string())])

AUTO_TOOLS, FORCED_TOOLS, TEMPLATE = "tools", "tool_choice", "chat_template_kwargs"
"""What an engine may honour beside sampling parameters: tools that the model may call or not; a call that the request
demands, which is text of a given form; arguments of the chat template."""
_REMEMBERED = 256


@runtime_checkable
class AnswersRequests(Protocol):
    """An engine class that generates from :data:`SCHEMA`, for ``JobSpec.request_column``, into :func:`fields`."""

    @classmethod
    def request_parameters(cls) -> frozenset[str]:
        """The parameters of a row that it honours: sampling parameters by vLLM's names, and the constants above. A
        parameter whose effect the engine cannot have, because its answers do not depend on it, counts."""
        ...


@dataclass(frozen=True, slots=True)
class Parameters:
    """A row's own parameters. ``sampling``: by vLLM's names, checked; ``tools``: as OpenAI's API has them; ``key``: the
    same text for the same parameters."""

    sampling: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    template: Mapping[str, Any]
    key: str

    @property
    def n(self) -> int:
        return int(self.sampling.get("n", 1))


def encoded(sampling: Mapping[str, Any], tools: Sequence[Any] = (), template: Mapping[str, Any] | None = None) -> str:
    """What stands in the column :data:`PARAMETERS`."""
    return json.dumps([dict(sampling), list(tools), dict(template or {})])


@functools.lru_cache(_REMEMBERED)
def decoded(text: str) -> Parameters:
    """The parameters of a row. Many rows have the same ones."""
    sampling, tools, template = json.loads(text)
    return Parameters(sampling, tools, template, text)


def prompt_of(text: str) -> Any:
    """The prompt of a row: text, token ids or messages. Raises :class:`RowError` for text that no tokenizer takes."""
    prompt = json.loads(text)
    if prompt == "":
        raise RowError(RowErrorCode.INVALID_VALUE, "the prompt is empty")
    return prompt


def fields() -> list[pa.Field[Any]]:
    """What the engine answers: a text and a reason for every choice, ``logprobs`` for every choice where they were
    asked for (else null), and counts over all choices."""
    columns: list[tuple[str, pa.DataType]] = [
        ("outputs", pa.list_(pa.string())),
        ("finish_reasons", pa.list_(pa.string())),
        *((name, pa.int32()) for name in COUNTS),
        ("logprobs", pa.list_(LOGPROBS)),
    ]
    return [pa.field(name, kind) for name, kind in columns]
