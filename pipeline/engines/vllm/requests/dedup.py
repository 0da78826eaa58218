"""Runs equal prompts of one call once, where the prompt alone decides the answer."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from pipeline.engines.generation.sampling_columns import key_of
from pipeline.engines.vllm.prompts.prompts import Prompt
from pipeline.spec.job_spec import JobSpec

A = TypeVar("A")
P = TypeVar("P")

DedupKey = Callable[[Prompt, bytes], bytes | None]

MEMORY_BYTES = 32 * 2**20
"""Most memory for the answers that later prompts may get."""
ENTRY_BYTES = 300
"""What an answer takes in addition to its text, roughly: key, tuple, dictionary entry."""


def is_deterministic(sampling: Mapping[str, Any]) -> bool:
    """Whether the prompt and these sampling parameters decide the answer: greedy decoding, or a seed."""
    # To vLLM, -1 is no seed.
    return sampling.get("temperature") == 0 or sampling.get("seed") not in (None, -1)


def dedup_key(prompt: Prompt, tokens: bytes, *, sampled: bool = False) -> bytes | None:
    """What decides a row's answer in addition to its job's parameters: ``tokens``, its own parameters, its adapter.

    ``None`` for a row with media, and (without ``sampled``) for one whose own parameters leave the answer to chance."""
    own = prompt.params
    if prompt.make is not None:
        return None
    if own is not None and not (sampled or own.sampling.temperature == 0 or own.sampling.seed is not None):
        return None
    adapter = "" if prompt.adapter is None else str(prompt.adapter.lora_name)
    # Digests and JSON: neither holds a zero byte.
    return b"\0".join((adapter.encode(), b"" if own is None else own.key.encode(), tokens))


def dedup_keys(*, pools: bool, is_deterministic: bool, sampled: bool = False) -> DedupKey:
    """A function from a prompt and the bytes of its tokens to its key; ``None`` where the answer is left to chance.

    ``pools``: they are pooled. ``is_deterministic``: the job's parameters decide the answer of rows without their own.
    """

    def pooled(prompt: Prompt, tokens: bytes) -> bytes:
        # The token types of a pair; the rest is the job's.
        own = prompt.params.sampling.extra_kwargs if prompt.params is not None else None
        return b"\0".join((key_of(own or {}).encode(), tokens))

    def generated(prompt: Prompt, tokens: bytes) -> bytes | None:
        if prompt.params is None and not is_deterministic:
            return None
        return dedup_key(prompt, tokens, sampled=sampled)

    return pooled if pools else generated


class RequestDedup(Generic[A, P]):
    """What one call has run, is running and has waiting. Callers hold a lock: it is not safe for several threads.

    The first row with a prompt leads; those that come while it waits or runs follow it and get what it gets. Those that
    come later get its answer from memory, as long as it is there: up to ``memory`` bytes, the oldest going first.
    """

    def __init__(self, memory: int = MEMORY_BYTES) -> None:
        self._memory = memory
        self.waiting = 0
        """Prompts that follow another."""
        self._bytes = 0
        self._leaders: dict[int, bytes] = {}
        self._followers: dict[bytes, list[P]] = {}
        self._answers: OrderedDict[bytes, tuple[A, int]] = OrderedDict()

    def admit(self, row: int, key: bytes, prompt: P) -> tuple[bool, A | None]:
        """Whether ``row`` must be run, and its answer if that is known. Neither: ``prompt`` follows another."""
        digest = hashlib.blake2b(key, digest_size=16).digest()
        if digest in self._followers:
            self._followers[digest].append(prompt)
            self.waiting += 1
            return False, None
        if digest in self._answers:
            return False, self._answers[digest][0]
        self._leaders[row] = digest
        self._followers[digest] = []
        return True, None

    def finish(self, row: int, answer: A | None, n_bytes: int) -> list[P]:
        """A row that was run has its ``answer``, of ``n_bytes`` (``None``: it failed). Returns what followed it:
        nothing, for a row that was run without having been admitted."""
        digest = self._leaders.pop(row, None)
        if digest is None:
            return []
        followers = self._followers.pop(digest)
        self.waiting -= len(followers)
        if answer is not None:
            size = n_bytes + ENTRY_BYTES
            self._answers[digest] = answer, size
            self._bytes += size
            while self._bytes > self._memory:
                _, (_, freed) = self._answers.popitem(last=False)
                self._bytes -= freed
        return followers


def dedup_for(spec: JobSpec, *, pools: bool) -> RequestDedup[Any, Prompt] | None:
    """For jobs in which equal prompts may have one answer: what is pooled, as the job says, or as a row may."""
    by_row = {"temperature", "seed"} & spec.sampling_columns.keys() or spec.request_column is not None
    return RequestDedup() if pools or is_deterministic(spec.sampling) or by_row else None
