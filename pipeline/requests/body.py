"""The body of a request, parsed and checked: what it asks of an engine, and what its response must repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.engines.generation import chat_messages
from pipeline.engines.generation.request_rows import AUTO_TOOLS, FORCED_TOOLS, TEMPLATE
from pipeline.engines.generation.validators import MAPPING, MOST, at_least
from pipeline.requests import parameters
from pipeline.requests.faults import RequestError, invalid, missing, unsupported
from pipeline.requests.tools import Tools, tools_of
from pipeline.spec import json_text
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.request_fields import CHAT, COMPLETIONS, EMBEDDINGS
from storage.errors import RowError

PROMPT_OF: Mapping[str, str] = {CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input"}
"""Endpoint → the parameter that it cannot do without."""
MOST_PROMPTS = 2048
"""Most prompts or inputs of one request, as in OpenAI's API."""


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request. ``prompts``: what an engine computes one by one: messages (one list of them), texts, or lists
    of token ids. ``logprobs``: how many alternatives to each token the response shows; ``None``: no probabilities."""

    endpoint: str
    model: str
    prompts: tuple[Any, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tools: Tools = field(default_factory=Tools)
    template: Mapping[str, Any] = field(default_factory=dict)
    encoding_format: str = "float"
    dimensions: int | None = None

    @property
    def n(self) -> int:
        return int(self.sampling.get("n", 1))

    @property
    def logprobs(self) -> int | None:
        return self.sampling.get("logprobs")


def loads(text: str | bytes) -> Any:
    """The value of a request's JSON text. Raises :class:`RequestError` for what is not JSON (``NaN``, too)."""
    try:
        return json_text.loads(text, constants=False)
    except ValueError as error:
        raise RequestError(RowErrorCode.INVALID_VALUE, f"the request is not JSON: {error}") from None


def parse(
    endpoint: str,
    body: Any,
    *,
    honoured: frozenset[str],
    defaults: Mapping[str, Any] | None = None,
    template: Mapping[str, Any] | None = None,
) -> Request:
    """A request from its body: JSON text, or the parsed object.

    ``honoured``: what the engine does of the parameters, see
    :class:`~pipeline.engines.generation.request_rows.AnswersRequests`; not used for embeddings, whose parameters act on
    the finished vectors. ``defaults`` and ``template``: sampling parameters and arguments of the chat template where
    the body says nothing. Raises :class:`RequestError`, with the code ``invalid_value``, ``missing_value`` or
    ``unsupported_parameter``, and the parameter at fault.
    """
    if isinstance(body, (str, bytes)):
        body = loads(body)
        if isinstance(body, str):  # JSON text, kept as text in a JSON column
            body = loads(body)
    if not isinstance(body, Mapping):
        raise RequestError(RowErrorCode.INVALID_VALUE, "the request must be a JSON object")
    check_values(body)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise missing("model") if model is None else invalid("model", "must be the name of a model")
    found = parameters.given(endpoint, body)
    if endpoint == EMBEDDINGS:
        return _embeddings(model, found)
    sampling, asked = parameters.sampling_of(endpoint, found, defaults or {})
    if endpoint == COMPLETIONS:
        prompts = _texts_or_tokens("prompt", found)
        _refuse_unhonoured(asked, honoured, found)
        return Request(endpoint, model, prompts, sampling)
    return _chat(model, found, sampling, asked, honoured, template or {})


def _chat(
    model: str,
    found: Mapping[str, Any],
    sampling: dict[str, Any],
    asked: set[str],
    honoured: frozenset[str],
    template: Mapping[str, Any],
) -> Request:
    if "messages" not in found:
        raise missing("messages")
    try:
        messages = chat_messages.parse_messages(found["messages"])
    except RowError as error:
        raise RequestError(error.code, error.message, "messages") from None
    tools, own = tools_of(found), found.get("chat_template_kwargs", {})
    parameters.require("chat_template_kwargs", MAPPING, own)
    if own:
        asked = asked | {TEMPLATE}
    if tools.demanded:
        if sampling.get("structured_outputs") is not None:
            raise invalid("tool_choice", "demands a call of a tool, and response_format another answer; give one")
        sampling = {**sampling, "structured_outputs": tools.form()}
        parameters.check(sampling)
        asked = asked | {FORCED_TOOLS}
    elif tools.choice == "auto":
        asked = asked | {AUTO_TOOLS}
    _refuse_unhonoured(asked, honoured, found)
    return Request(CHAT, model, (messages,), sampling, tools, {**template, **own})


def _embeddings(model: str, found: Mapping[str, Any]) -> Request:
    texts = _texts_or_tokens("input", found)
    if not all(isinstance(text, str) for text in texts):
        raise unsupported("input", "token ids are not supported; give text")
    form = found.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise invalid("encoding_format", "must be float or base64")
    if (dimensions := found.get("dimensions")) is not None:
        parameters.require("dimensions", at_least(1), dimensions)
    return Request(EMBEDDINGS, model, texts, encoding_format=form, dimensions=dimensions)


def _texts_or_tokens(name: str, found: Mapping[str, Any]) -> tuple[Any, ...]:
    """One prompt or several: text, token ids, or a list of either."""
    if name not in found:
        raise missing(name)
    value = found[name]
    several = value if isinstance(value, (list, tuple)) and not _are_tokens(value) else [value]
    if not several:
        raise invalid(name, "must not be empty")
    if len(several) > MOST_PROMPTS:
        raise invalid(name, f"holds {len(several):,} items; {MOST_PROMPTS:,} are allowed")
    kinds = {str if isinstance(item, str) else list for item in several}
    if len(kinds) > 1 or not all(isinstance(item, str) or (item and _are_tokens(item)) for item in several):
        raise invalid(name, "must be text, a list of texts, token ids (whole numbers), or a list of lists of them")
    if "" in several:
        raise invalid(name, "an empty text cannot be computed")
    return tuple(several)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )


def _refuse_unhonoured(asked: set[str], honoured: frozenset[str], found: Mapping[str, Any]) -> None:
    if lacking := sorted(asked - honoured):
        name = lacking[0]
        why = _REMEDIES.get(name, "the engine cannot honour it; remove it")
        said = "response_format" if name == "structured_outputs" and name not in found else name
        raise unsupported(said, why)


_REMEDIES = {
    AUTO_TOOLS: "the engine does not read calls out of an answer; demand one (tool_choice), or set tool_choice: none"
}


def check_values(body: Any) -> None:
    """Raise :class:`RequestError` for what no engine and no store takes: NUL, half of a surrogate pair, whole numbers
    past 64 bits, anywhere in the body."""
    level: Sequence[tuple[str | None, Any]] = [(None, body)]
    while level:
        below: list[tuple[str | None, Any]] = []
        for param, item in level:
            if isinstance(item, str):
                _check_text(param, item)
            elif isinstance(item, bool) or item is None:
                continue
            elif isinstance(item, int):
                if not -MOST - 1 <= item <= MOST:
                    raise RequestError(RowErrorCode.INVALID_VALUE, "holds a whole number past 64 bits", param)
            elif isinstance(item, Mapping):
                for key in item:
                    _check_text(param, key)
                below += [(param or str(key), value) for key, value in item.items()]
            elif isinstance(item, (list, tuple)):
                below += [(param, value) for value in item]
        level = below


def _check_text(param: str | None, text: str) -> None:
    if "\0" in text:
        raise RequestError(RowErrorCode.INVALID_VALUE, "holds a NUL character", param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(RowErrorCode.INVALID_UTF8, "holds half of a surrogate pair", param) from None
