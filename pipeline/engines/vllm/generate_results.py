"""From vLLM's finished requests to result columns: generate and chat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engines.base import RowFailure
from pipeline.engines.generation.structured_output import Form
from pipeline.engines.vllm.requests.outcome import Finished, Outcome
from pipeline.spec.error_codes import MESSAGE_LIMIT, RowErrorCode
from pipeline.spec.job_spec import JobSpec

GIVEN_UP = "vLLM gave the request up with an internal error"

Token = dict[str, Any]
"""One item of ``logprobs``: ``token_id``, ``token``, ``logprob``, ``top_logprobs``."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One row's finished request. ``texts`` has ``n`` items; ``completion_tokens`` counts all of them.

    ``finish_reasons``: of each text; ``top``: how many alternatives to each token the row asked for itself.
    ``logprobs`` (for each text) and ``prompt_logprobs``: vLLM's own, as tokens and what was probable in their places;
    ``data``: what was pooled, as vLLM returned it. ``copied``: it was computed for another row, and
    nothing for this one.
    """

    row: int
    prompt_tokens: int
    cached_tokens: int
    texts: tuple[str, ...] = ()
    finish_reason: str = "stop"
    completion_tokens: int = 0
    logprobs: tuple[tuple[Any, Any], ...] = ()
    prompt_logprobs: tuple[Any, Any] | None = None
    finish_reasons: tuple[str, ...] = ()
    top: int | None = None
    data: Any = None
    copied: bool = False


class Answers:
    """Reads the answers to one job. ``form``: what they have to be, where a row does not say it for itself."""

    requests_per_row = 1

    def __init__(self, spec: JobSpec, form: Form | None) -> None:
        self._form = form
        self._several = spec.sampling.get("n", 1) != 1
        self._top = spec.sampling.get("logprobs")
        self._wanted: Sequence[int] | None = spec.sampling.get("logprob_token_ids") or None
        self._prompt_top = spec.sampling.get("prompt_logprobs")

    def answers(self, outcomes: Sequence[Outcome]) -> list[Answer | RowFailure]:
        """The rows' answers; as failures those that do not keep to their form."""
        return [self._read(done) if isinstance(done, Finished) else done for done in outcomes]

    def _read(self, finished: Finished) -> Answer | RowFailure:
        prompt, output = finished.prompt, finished.output
        done = sorted(output.outputs, key=lambda completion: completion.index)
        reasons = [completion.finish_reason for completion in done]
        if finished.given_up:
            return RowFailure(prompt.row, RowErrorCode.ENGINE_REFUSED, GIVEN_UP)
        form = self._form if prompt.params is None else prompt.params.form
        if form is not None:
            for completion in done:
                # A stop string or token of the user's ends an answer wherever it stands.
                ended = completion.finish_reason == "stop" and completion.stop_reason is None
                if why := form.broken(completion.text, ended=ended):
                    return RowFailure(prompt.row, RowErrorCode.INVALID_OUTPUT, why[:MESSAGE_LIMIT])
        before = output.prompt_logprobs
        return Answer(
            row=prompt.row,
            texts=tuple(completion.text for completion in done),
            # Of several answers: whether any of them was cut off.
            finish_reason="length" if "length" in reasons else str(reasons[0]),
            finish_reasons=tuple(map(str, reasons)),
            top=None if prompt.params is None else getattr(prompt.params.sampling, "logprobs", None),
            prompt_tokens=finished.prompt_tokens,
            cached_tokens=finished.cached_tokens,
            completion_tokens=finished.completion_tokens,
            logprobs=tuple((c.token_ids, c.logprobs) for c in done if c.logprobs is not None),
            prompt_logprobs=None if before is None else (output.prompt_token_ids, before),
            copied=finished.copied,
        )

    def columns(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """The values of every column that generate and chat may have."""
        logprobs = [[_tokens(came, at, self._top, self._wanted) for came, at in answer.logprobs] for answer in answers]
        return {
            "output": [answer.texts[0] for answer in answers],
            "outputs": [answer.texts for answer in answers],
            "finish_reason": [answer.finish_reason for answer in answers],
            "prompt_tokens": [answer.prompt_tokens for answer in answers],
            "cached_tokens": [answer.cached_tokens for answer in answers],
            "completion_tokens": [answer.completion_tokens for answer in answers],
            "logprobs": logprobs if self._several else [next(iter(found), None) for found in logprobs],
            "prompt_logprobs": [
                None
                if answer.prompt_logprobs is None
                else _tokens(answer.prompt_logprobs[0], answer.prompt_logprobs[1], self._prompt_top, None)
                for answer in answers
            ],
        }


class RequestAnswers(Answers):
    """Reads the answers to rows that are requests. They have no form: an answer that was cut off says so itself."""

    def __init__(self, spec: JobSpec) -> None:
        super().__init__(spec, None)

    def columns(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """The values of :func:`pipeline.engines.generation.request_rows.fields`."""
        return {
            "outputs": [answer.texts for answer in answers],
            "finish_reasons": [answer.finish_reasons for answer in answers],
            "prompt_tokens": [answer.prompt_tokens for answer in answers],
            "cached_tokens": [answer.cached_tokens for answer in answers],
            "completion_tokens": [answer.completion_tokens for answer in answers],
            "logprobs": [
                [_tokens(came, at, answer.top, None) for came, at in answer.logprobs] or None for answer in answers
            ],
        }


def _tokens(
    came: Iterable[int], at: Iterable[Mapping[int, Any] | None], top: int | None, wanted: Sequence[int] | None
) -> list[Token | None]:
    return [
        None if probable is None else _token(token, probable, top, wanted)
        for token, probable in zip(came, at, strict=False)
    ]


def _token(came: int, at: Mapping[int, Any], top: int | None, wanted: Sequence[int] | None) -> Token:
    """``at``: token id → vLLM's ``Logprob``: of the token that came, and of the likeliest (or of those wanted)."""
    if wanted is not None:
        likely = [token for token in wanted if token in at]
    else:
        ranked = [token for token in at if top is not None and (top == -1 or (at[token].rank or 0) <= top)]
        likely = sorted(ranked, key=lambda token: at[token].rank or 0)
    return {**_likely(came, at), "top_logprobs": [_likely(token, at) for token in likely]}


def _likely(token: int, at: Mapping[int, Any]) -> Token:
    return {"token_id": token, "token": at[token].decoded_token, "logprob": at[token].logprob}
