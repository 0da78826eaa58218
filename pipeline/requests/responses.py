"""The bodies of responses, as OpenAI's own types have them. Pure: ids and times are the caller's."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.requests.body import Request
from pipeline.requests.tools import calls_of
from pipeline.spec.request_fields import CHAT

LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine answered to one prompt: its row of :func:`pipeline.engines.generation.request_rows.fields`."""

    outputs: Sequence[str]
    finish_reasons: Sequence[str]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    logprobs: Sequence[Sequence[Mapping[str, Any]]] | None = None


def generated(request: Request, answers: Sequence[Answer], *, id: str, created: int) -> dict[str, Any]:  # noqa: A002
    """The body of a chat or completion. ``answers``: one for each prompt, in order; ``created``: seconds (Unix)."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    cached = sum(answer.cached_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    chat = request.endpoint == CHAT
    choices = [_choice(request, answer, at) for answer in answers for at in range(len(answer.outputs))]
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": request.model,
        "choices": [{"index": index, **choice} for index, choice in enumerate(choices)],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }


def embedded(request: Request, vectors: Sequence[npt.NDArray[np.float32]], tokens: int) -> dict[str, Any]:
    """The body of embeddings, one for each input, in order; ``tokens``: of all inputs."""
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, request.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "model": request.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encoded(vector: npt.NDArray[np.float32], form: str) -> str | list[float]:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    # The shortest text that is this float32 again, and not that of the double beside it.
    return [float(text) for text in vector.astype(np.float32).astype("U")] if len(vector) else []


def _choice(request: Request, answer: Answer, at: int) -> dict[str, Any]:
    text, reason = answer.outputs[at], answer.finish_reasons[at]
    tokens = answer.logprobs[at] if answer.logprobs is not None and request.logprobs is not None else None
    if request.endpoint != CHAT:
        return {
            "text": text,
            "finish_reason": reason,
            "logprobs": None if tokens is None else _completion_logprobs(tokens),
        }
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if request.tools.demanded and (calls := calls_of(text, request.tools.choice if request.tools.named else None)):
        message["content"] = None
        message["tool_calls"] = [
            {"id": f"call_{at}_{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for n, (name, arguments) in enumerate(calls)
        ]
        if reason == "stop" and not request.tools.named:
            reason = "tool_calls"  # as OpenAI's API; a function that was named leaves "stop"
    return {
        "message": message,
        "finish_reason": reason,
        "logprobs": None if tokens is None else {"content": [_chat_logprob(token) for token in tokens]},
    }


def _chat_logprob(token: Mapping[str, Any]) -> dict[str, Any]:
    return {**_likely(token), "top_logprobs": [_likely(other) for other in token["top_logprobs"] or ()]}


def _likely(token: Mapping[str, Any]) -> dict[str, Any]:
    text = token["token"] or ""
    return {"token": text, "logprob": _finite(token["logprob"]), "bytes": list(text.encode())}


def _completion_logprobs(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    texts = [token["token"] or "" for token in tokens]
    offsets = itertools.accumulate((len(text) for text in texts), initial=0)
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token["logprob"]) for token in tokens],
        "top_logprobs": [
            {other["token"] or "": _finite(other["logprob"]) for other in token["top_logprobs"] or ()}
            for token in tokens
        ],
        "text_offset": [offset for offset, _ in zip(offsets, texts, strict=False)],
    }


def _finite(logprob: float) -> float:
    return max(float(logprob), LEAST_LOGPROB)
