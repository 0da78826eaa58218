"""The prompts of ``benchmarks/llm``, and how the engine is set up for each workload.

Texts are random words, so that nothing is shared but what the workload shares on purpose. Every round has prompts of
its own (a number in front of each), so that no engine finds the last round's prompts in its cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from examples.tiny_llama import CORPUS

WORDS = sorted({word for word in CORPUS.replace('"', " ").split() if word.isalpha() and len(word) > 2})
BLOCK_TOKENS = 128
"""Tokens in a block of vLLM's KV cache on a CPU."""
PREFIX_TOKENS = 4 * BLOCK_TOKENS
MOST_TOKENS = 6
"""No word has more."""
STOPS = ["e", "a"]
"""A greedy answer ends at the first of these letters: after a few tokens, or many, or never."""


@dataclass(frozen=True, slots=True)
class Workload:
    """``texts`` are the prompts of one round; ``options`` are vLLM's, the same for every contender."""

    name: str
    sampling: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    rows: int = 256
    prefix_tokens: int = 0
    rows_per_prefix: int = 1
    duplicates: float = 0.0
    ours: str = "rowmill"
    against: tuple[tuple[str, float | None], ...] = (("floor", 0.97), ("chunks", 1.0))
    """Whom we are compared with, and how many times as fast we are meant to be."""
    peers: tuple[str, ...] = ("ray", "daft")
    """Those of ``peers/generation.py`` that can do it."""

    def texts(self, round_: int, count: Callable[[str], int]) -> list[str]:
        """The prompts of round ``round_``, shuffled where they share something; ``count``: how many tokens it is."""
        chance = random.Random(f"{self.name} {round_}")

        def words(n: int) -> str:
            return " ".join(chance.choices(WORDS, k=n))

        if self.prefix_tokens:
            prefixes = [f"{round_} {n}:" for n in range(self.rows // self.rows_per_prefix)]
            for n, prefix in enumerate(prefixes):
                while (short := self.prefix_tokens - count(prefix)) > 0:
                    prefix += f" {words(max(1, short // MOST_TOKENS))}"
                prefixes[n] = prefix
            found = [f"{prefix} {words(6)}" for prefix in prefixes for _ in range(self.rows_per_prefix)]
            chance.shuffle(found)
            return found
        found = [f"{round_} {n}: {words(chance.randint(10, 40))}" for n in range(self.rows)]
        copies = int(self.rows * self.duplicates)
        for at in range(self.rows - copies, self.rows):
            found[at] = found[chance.randrange(self.rows - copies)]
        if copies:
            chance.shuffle(found)
        return found


def workloads(rows: int, tokens: int) -> dict[str, Workload]:
    """All of them, at about ``rows`` rows of about ``tokens`` generated tokens; the cache of the last holds 60% of its
    prefixes."""
    greedy = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    # Prefixes of four whole blocks; what comes after them, and the answer, is a block of its own in each request.
    prefixes = max(4, rows // 12)
    blocks = max(24, round(0.6 * prefixes * PREFIX_TOKENS / BLOCK_TOKENS))
    found = [
        Workload("uniform", greedy, rows=rows),
        Workload("skewed", {**greedy, "max_tokens": 6 * tokens, "stop": STOPS}, rows=rows),
        Workload("duplicates", greedy, rows=rows, duplicates=0.2, against=(("floor", 1.15), ("chunks", 1.0))),
        Workload(
            "prefixes",
            {**greedy, "max_tokens": max(2, tokens // 4)},
            options={"num_gpu_blocks_override": blocks},
            rows=8 * prefixes,
            prefix_tokens=PREFIX_TOKENS,
            rows_per_prefix=8,
            against=(("floor", 2.5), ("chunks", 1.0)),
        ),
    ]
    # vllm run-batch knows chats only.
    chats = {"uniform": "chat", "duplicates": "chat-duplicates", "prefixes": "chat-prefixes"}
    found += [
        replace(one, name=chats[one.name], ours="rowmill_chat", against=(("run_batch", 1.1),), peers=())
        for one in found
        if one.name in chats
    ]
    return {workload.name: workload for workload in found}
