"""vLLM's ``SamplingParams`` of a job, and of the rows that have some of their own."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.engines.generation import structured_output
from pipeline.engines.generation.request_rows import Parameters, decoded
from pipeline.engines.generation.sampling import SAMPLING
from pipeline.engines.generation.sampling_columns import key_of, sampling_of
from pipeline.engines.generation.structured_output import Form
from pipeline.engines.vllm.process.output import first_lines
from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidJob, RowError

REMEMBERED = 1024
"""Rows' own parameters that are kept for the next row with the same ones."""


@dataclass(frozen=True, slots=True)
class Params:
    """``sampling``: vLLM's ``SamplingParams``; ``form``: what the answer has to be, if that was asked for; ``key``: the
    same text for the same parameters of a row."""

    sampling: Any
    form: Form | None = None
    key: str = ""


class JobParams:
    """Not to be shared between threads.

    Raises :class:`InvalidJob` for parameters of the job that vLLM refuses for this model.
    """

    def __init__(self, running: RunningVllm, spec: JobSpec) -> None:
        self._running, self._spec = running, spec
        self.job = self._made(spec.sampling)
        self.columns = tuple(spec.sampling_columns.values())
        self._of_row = functools.lru_cache(REMEMBERED)(self._own)

    def of(self, row: Mapping[str, Any]) -> Params | None:
        """The row's own parameters, or ``None`` where they are the job's. Raises :class:`RowError`."""
        own = sampling_of(self._spec, row) if self.columns else None
        return None if own is None else self._of_row(key_of(own))

    def of_request(self, parameters: Parameters) -> Params:
        """The parameters of a row that is a request, over the defaults of the model's own files, as ``vllm serve`` has
        them. The answer may be cut off: its ``finish_reason`` says so. Raises :class:`RowError`."""
        return self._of_row(parameters.key)

    def _own(self, key: str) -> Params:
        """``key``: a row's sampling parameters, or a request's, as JSON."""
        own = json.loads(key)
        try:
            if isinstance(own, dict):
                return replace(self._made(own), key=key)
            return Params(sampling_params(self._running, self._over(decoded(key))), key=key)
        except InvalidJob as error:
            raise RowError(RowErrorCode.INVALID_VALUE, str(error)) from None

    def _over(self, parameters: Parameters) -> dict[str, Any]:
        files: Mapping[str, Any] = self._running.config.model_config.get_diff_sampling_param() or {}
        defaults = {name: value for name, value in files.items() if name in SAMPLING}
        own = dict(parameters.sampling)
        if own.get("max_tokens") is None and "max_tokens" in defaults:
            own.pop("max_tokens", None)
        return {**defaults, **own}

    def _made(self, sampling: Mapping[str, Any]) -> Params:
        # Answers of a model that thinks first begin with its thoughts, which keep to nothing.
        thinks = self._running.config.structured_outputs_config.reasoning_parser
        form = None if thinks else structured_output.form(sampling.get("structured_outputs"))
        return Params(sampling_params(self._running, sampling), form)


def sampling_params(running: RunningVllm, sampling: Mapping[str, Any]) -> Any:
    """``SamplingParams`` that vLLM has seen and accepted for this model. Raises :class:`InvalidJob`."""
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

    given = dict(sampling)
    field = "sampling"
    try:
        for name, kind in (
            ("structured_outputs", StructuredOutputsParams),
            ("repetition_detection", RepetitionDetectionParams),
        ):
            if given.get(name) is not None:
                field = f"sampling.{name}"
                given[name] = kind(**given[name])
        field = "sampling"
        if given.get("logit_bias") is not None:
            given["logit_bias"] = {int(token): float(bias) for token, bias in given["logit_bias"].items()}
        params = SamplingParams(**given, output_kind=RequestOutputKind.FINAL_ONLY)
        # What vLLM would refuse of each request is refused here once, for the job.
        running.llm.input_processor.process_inputs(
            "check", {"type": "token", "prompt_token_ids": [0]}, params, supported_tasks=running.supported_tasks
        )
    except (VLLMClientError, ValueError, TypeError) as error:
        parameter = getattr(error, "parameter", None)
        where = f"sampling.{parameter}" if parameter in SAMPLING else field
        raise InvalidJob(f"vLLM refuses it: {first_lines(error)}", field=where) from error
    return params
