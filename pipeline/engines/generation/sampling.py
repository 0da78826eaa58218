"""vLLM's sampling parameters that a job may set, by vLLM's own names, and what each may hold.

Static, because the host that submits a job may not have vLLM installed. The tables are those of vLLM 0.32; a test holds
them against the installed release. What only vLLM can judge (a range that depends on the model, a grammar that does not
compile) is judged by vLLM before the first row.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pipeline.engines.generation import structured_output
from pipeline.engines.generation.validators import (
    FLAG,
    INT,
    MAPPING,
    TEXT_OR_TEXTS,
    TEXTS,
    TOKEN_BIAS,
    TOKEN_IDS,
    Check,
    at_least,
    or_none,
    refuse_wrong,
    unknown_name,
    within,
)
from storage.errors import InvalidJob

_MOST_ANSWERS = 16_384
"""To one prompt; vLLM's own limit."""
SAMPLING: Mapping[str, Check] = MappingProxyType(
    {
        "n": ("a whole number from 1 to 16384", lambda value: INT[1](value) and 1 <= value <= _MOST_ANSWERS),
        "presence_penalty": within("from -2 to 2", lambda value: -2 <= value <= 2),
        "frequency_penalty": within("from -2 to 2", lambda value: -2 <= value <= 2),
        "repetition_penalty": within("above 0", lambda value: value > 0),
        "temperature": within("from 0 to 2", lambda value: 0 <= value <= 2),
        "watermarking": or_none(FLAG),
        "top_p": within("above 0 and at most 1", lambda value: 0 < value <= 1),
        "top_k": at_least(-1),
        "min_p": within("from 0 to 1", lambda value: 0 <= value <= 1),
        "seed": or_none(INT),
        "stop": or_none(TEXT_OR_TEXTS),
        "stop_token_ids": or_none(TOKEN_IDS),
        "ignore_eos": FLAG,
        "max_tokens": or_none(at_least(1)),
        "min_tokens": at_least(0),
        "skip_special_tokens": FLAG,
        "spaces_between_special_tokens": FLAG,
        "include_stop_str_in_output": FLAG,
        "structured_outputs": or_none(MAPPING),
        "logit_bias": or_none(TOKEN_BIAS),
        "allowed_token_ids": (
            "a list of at least one token id, or null",
            lambda value: value is None or (TOKEN_IDS[1](value) and len(value) > 0),
        ),
        "extra_args": or_none(MAPPING),
        "bad_words": or_none(TEXTS),
        "skip_reading_prefix_cache": or_none(FLAG),
        "thinking_token_budget": or_none(at_least(-1)),
        "repetition_detection": or_none(MAPPING),
        "logprobs": or_none(at_least(-1)),
        "prompt_logprobs": or_none(at_least(-1)),
        "logprob_token_ids": or_none(TOKEN_IDS),
    }
)
"""vLLM's ``SamplingParams`` that a job may set, by vLLM's own names."""

SAMPLING_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "prompt_logprob_token_ids": "only the likeliest tokens of a prompt are offered, by prompt_logprobs",
        "prompt_logprob_start": "only the likeliest tokens of a prompt are offered, by prompt_logprobs",
        "flat_logprobs": "the result column has its own layout",
        "detokenize": "the result is text, so the tokens are always turned into it",
        "output_kind": "Rowmill sets it: a row is written when it is finished",
        "stream_interval": "Rowmill sets it: a row is written when it is finished",
        "skip_clone": "it is internal to vLLM",
        "output_text_buffer_length": "it is internal to vLLM",
        "routed_experts_prompt_start": "the experts that were chosen are not offered as a result column",
        "trace_decode_token_ids": "replaying given tokens is not offered",
    }
)
"""``SamplingParams`` that exist but are not a job's to set, and why."""


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidJob` for a name that vLLM does not have, or a value that it could not take."""
    for name, value in sampling.items():
        check_parameter(name, value)
    least, most = sampling.get("min_tokens", 0), sampling.get("max_tokens", 16)
    if most is not None and least > most:
        raise InvalidJob(f"{least} is more than max_tokens, which is {most}", field="sampling.min_tokens")
    if sampling.get("n", 1) > 1 and sampling.get("temperature", 1) == 0:
        raise InvalidJob("at temperature 0 there is not more than one answer to a prompt", field="sampling.n")


def check_parameter(name: str, value: Any) -> None:
    """Raise :class:`InvalidJob` unless vLLM has a parameter of that name that could take the value."""
    field = f"sampling.{name}"
    if name in SAMPLING_REFUSED:
        raise InvalidJob(SAMPLING_REFUSED[name], field=field)
    if name not in SAMPLING:
        raise InvalidJob(unknown_name("sampling parameters", name, SAMPLING), field=field)
    refuse_wrong(field, SAMPLING[name], value)
    if name == "structured_outputs" and value is not None:
        structured_output.check(value)
