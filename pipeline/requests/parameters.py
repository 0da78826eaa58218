"""The parameters of a request: which there are at each endpoint, what each must hold, and what it is to an engine.

Nothing is ignored in silence: a parameter that is not in these tables, or that the engine does not honour, fails its
request with ``unsupported_parameter``, unless its value asks for nothing. ``null`` is the same as leaving it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pipeline.engines.generation.sampling import check_sampling
from pipeline.engines.generation.validators import FLAG, INT, MAPPING, Check, at_least
from pipeline.requests.faults import RequestError, invalid, unsupported
from pipeline.spec.request_fields import CHAT, COMPLETIONS, EMBEDDINGS
from storage.errors import InvalidJob

LABELS = frozenset({"model", "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
"""They name or group requests, and ask nothing of the model."""

IDLE: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "stream": (False,),
        "store": (False,),
        "echo": (False,),
        "suffix": ("",),
        "service_tier": ("auto", "default"),
        "modalities": (["text"],),
        "parallel_tool_calls": (True,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
    }
)
"""Parameters that are not supported, and the values of theirs that ask for nothing."""

SAMPLED = frozenset(
    {
        *("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "n", "logit_bias"),
        *("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "bad_words"),
        *("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "allowed_token_ids"),
        *("structured_outputs", "thinking_token_budget"),
    }
)
"""Parameters that engines know by the same name: OpenAI's, and vLLM's beside them."""

TOP_LOGPROBS = 20
"""Most alternatives to a token that OpenAI's chat API gives."""
COMPLETION_LOGPROBS = 5
"""The same of its completions."""
COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that does not say it, in OpenAI's API."""

_OWN: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        CHAT: SAMPLED
        | {"messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "response_format"}
        | {"tools", "tool_choice", "chat_template_kwargs"},
        COMPLETIONS: SAMPLED | {"prompt", "max_tokens", "logprobs", "best_of", "response_format"},
        EMBEDDINGS: frozenset({"input", "encoding_format", "dimensions"}),
    }
)


def given(endpoint: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that the body gives and that mean something, by name. Raises :class:`RequestError` for one that
    the endpoint does not have here."""
    found: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in LABELS:
            continue
        if name in _OWN[endpoint]:
            found[name] = value
        elif not any(value == idle and type(value) is type(idle) for idle in IDLE.get(name, ())):
            raise unsupported(name, f"{endpoint} has no such parameter here; remove it")
    return found


def require(name: str, check: Check, value: Any) -> None:
    """Raise :class:`RequestError` unless the value passes the check."""
    words, test = check
    if not test(value):
        raise invalid(name, f"must be {words}")


def sampling_of(endpoint: str, body: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The sampling parameters, by vLLM's names, over ``defaults``; and the names of those that the body asks for.

    ``body``: what :func:`given` returned. Raises :class:`RequestError`.
    """
    own = {name: value for name, value in body.items() if name in SAMPLED}
    if "seed" in own:
        require("seed", INT, own["seed"])
    if (most := _max_tokens(body)) is not None:
        own["max_tokens"] = most
    if (form := _form(body.get("response_format"))) is not None:
        if "structured_outputs" in own:
            raise invalid("structured_outputs", "excludes response_format; give one of them")
        own["structured_outputs"] = form
    if (top := _logprobs(endpoint, body)) is not None:
        own["logprobs"] = top
    if "best_of" in body and body["best_of"] != body.get("n", 1):
        raise unsupported("best_of", "only as many answers are made as are returned; remove it, or make it equal to n")
    limit = {"max_tokens": None if endpoint == CHAT else COMPLETION_TOKENS}
    sampling = {**limit, **defaults, **own}
    check(sampling)
    return sampling, set(own)


def check(sampling: Mapping[str, Any]) -> None:
    """Raise :class:`RequestError` for values that no engine could take."""
    try:
        check_sampling(sampling)
    except InvalidJob as error:
        name = (error.field or "").removeprefix("sampling.").partition(".")[0] or None
        raise RequestError("invalid_value", error.message, _SAYS.get(name or "", name)) from None


_SAYS = {"structured_outputs": "response_format"}


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    named = [name for name in ("max_completion_tokens", "max_tokens") if name in body]
    for name in named:
        require(name, at_least(1), body[name])
    if len({body[name] for name in named}) > 1:
        raise invalid(named[0], "differs from max_tokens, its older name; give one of them")
    return body[named[0]] if named else None


def _logprobs(endpoint: str, body: Mapping[str, Any]) -> int | None:
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if endpoint == COMPLETIONS:
        if wanted is not None:
            most = COMPLETION_LOGPROBS
            require("logprobs", (f"a whole number from 0 to {most}", lambda v: INT[1](v) and 0 <= v <= most), wanted)
        return wanted
    if wanted is not None:
        require("logprobs", FLAG, wanted)
    if top is not None:
        most = TOP_LOGPROBS
        require("top_logprobs", (f"a whole number from 0 to {most}", lambda v: INT[1](v) and 0 <= v <= most), top)
        if not wanted:
            raise invalid("top_logprobs", "needs logprobs: true")
    return (top or 0) if wanted else None


def _form(given: Any) -> dict[str, Any] | None:
    """vLLM's ``structured_outputs`` of a ``response_format``."""
    if given is None:
        return None
    require("response_format", MAPPING, given)
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise unsupported("response_format", "its type must be text, json_object or json_schema")
    described = given.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise invalid("response_format", "a json_schema needs json_schema.schema, an object")
    return {"json": dict(schema)}
