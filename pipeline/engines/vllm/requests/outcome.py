"""What becomes of a request: an output of vLLM's, or a failure of its row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipeline.engines.base import RowFailure
from pipeline.engines.vllm.prompts.prompts import Prompt

LOGPROB_BYTES = 260
"""What one of vLLM's ``Logprob`` objects takes, with its entry in a dictionary and its text."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that vLLM has finished. ``output``: its ``RequestOutput`` or ``PoolingRequestOutput``.

    ``copied``: it was run for another row, with the same prompt.
    """

    prompt: Prompt
    output: Any
    copied: bool = False

    def for_row(self, prompt: Prompt) -> Finished:
        """The same for another row with the same prompt."""
        return replace(self, prompt=prompt, copied=True)

    @property
    def _completions(self) -> list[Any]:
        return self.output.outputs if isinstance(self.output.outputs, list) else []

    @property
    def prompt_tokens(self) -> int:
        return len(self.output.prompt_token_ids)

    @property
    def cached_tokens(self) -> int:
        """The tokens of the prompt that were not computed for this row."""
        return self.prompt_tokens if self.copied else max(self.output.num_cached_tokens or 0, 0)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers; none where the model pools."""
        return sum(len(completion.token_ids) for completion in self._completions)

    @property
    def given_up(self) -> bool:
        """vLLM ended it by itself, and not because it was complete."""
        return any(completion.finish_reason in ("error", "abort") for completion in self._completions)

    @property
    def n_bytes(self) -> int:
        """The memory of its texts, tokens and probabilities, or of what was pooled, about."""
        texts = sum(len(completion.text) for completion in self._completions)
        places = [at for completion in self._completions for at in completion.logprobs or ()]
        probable = sum(len(at) for at in (*places, *(getattr(self.output, "prompt_logprobs", None) or ())) if at)
        tokens = len(self.prompt.tokens) + self.completion_tokens
        pooled = getattr(getattr(self.output.outputs, "data", None), "nbytes", 0)
        return int(texts) + 8 * tokens + LOGPROB_BYTES * probable + int(pooled)


Outcome = Finished | RowFailure
