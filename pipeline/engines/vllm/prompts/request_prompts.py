"""Rows that are requests, with all of their own parameters, as prompts of token ids."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.engines.arrow_text import values
from pipeline.engines.base import RowBatch
from pipeline.engines.generation import request_rows
from pipeline.engines.generation.request_rows import FORCED_TOOLS, TEMPLATE, Parameters
from pipeline.engines.generation.sampling import SAMPLING
from pipeline.engines.vllm.prompts.prompts import Prompt, Prompts
from pipeline.engines.vllm.prompts.sampling_params import JobParams
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec
from storage.errors import RowError

HONOURED = (frozenset(SAMPLING) - {"prompt_logprobs", "logprob_token_ids"}) | {FORCED_TOOLS, TEMPLATE}
"""Not tools that the model may call or not: nothing here reads calls out of a text."""
_REMEMBERED = 256


class RequestPrompts(Prompts):
    """Reads :data:`~pipeline.engines.generation.request_rows.SCHEMA`. Not to be shared between threads."""

    def __init__(self, llm: Any, spec: JobSpec, room: int, params: JobParams) -> None:
        super().__init__(llm, spec, room, params)
        self._own = params
        # Equal parameters have equal text.
        self._template_of = functools.lru_cache(_REMEMBERED)(self._template)

    def _row_reader(self, batch: RowBatch) -> Callable[[int], tuple[Prompt, str | None]]:
        texts, own = (values(batch.columns.column(name)) for name in (request_rows.PROMPT, request_rows.PARAMETERS))

        def make(at: int) -> tuple[Prompt, str | None]:
            parameters = request_rows.decoded(own[at])
            made = self._made(request_rows.prompt_of(texts[at]), parameters)
            prompt = Prompt(int(batch.rows[at]), [], self._own.of_request(parameters))
            return (prompt, made) if isinstance(made, str) else (replace(prompt, tokens=made), None)

        return make

    def _made(self, prompt: Any, parameters: Parameters) -> Any:
        """The prompt's text, or its tokens. Raises :class:`RowError`."""
        if self._chat:
            made = self._apply_chat_template(prompt, self._template_of(parameters.key))
        elif isinstance(prompt, str):
            made = prompt
        else:
            return self._valid(prompt, "prompt")
        if made in ("", []):
            raise RowError(RowErrorCode.INVALID_VALUE, "the prompt is empty")
        return made.lower() if self._lower_case and isinstance(made, str) else made

    def _template(self, key: str) -> Any:
        found = request_rows.decoded(key)
        return self._chat_params_of(found.tools, found.template)
