"""Bounds what prepared images, sounds and videos take: they are made while there is room for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

THREADS = 1
"""Media that are decoded and prepared at a time: one, as vLLM does it, since some models' processors take no two."""


class MediaMemoryBudget:
    """Prepared media inside one engine: no more are made while those there have ``n_bytes`` bytes or more.

    So at most ``n_bytes``, and one result for each thread, are there at a time. All methods but :meth:`close` belong
    to the engine's loop. ``size`` tells the bytes of a result.
    """

    def __init__(self, n_bytes: int, size: Callable[[Any], int], threads: int | None = None) -> None:
        self.n_bytes = n_bytes
        self._size = size
        self._threads = threads or THREADS
        self._pool = ThreadPoolExecutor(self._threads, "vllm-media")
        self._held: dict[str, int] = {}
        self._sum = self.most = 0
        self._making = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def make(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, run in a thread when it is this request's turn. Raises what it raises.

        It is held under ``name`` until :meth:`leave`.
        """
        loop = asyncio.get_running_loop()
        if self._free() and not self._waiting:
            self._making += 1
        else:
            turn = loop.create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # its turn had come already
                    self._making -= 1
                    self._next()
                raise
        try:
            made = await loop.run_in_executor(self._pool, make)
            self._held[name] = self._size(made)
            self._sum += self._held[name]
            self.most = max(self.most, self._sum)
            return made
        finally:
            self._making -= 1
            self._next()

    def leave(self, name: str) -> None:
        """The request is done with, if it ever was here."""
        self._sum -= self._held.pop(name, 0)
        self._next()

    def close(self) -> None:
        """Start no more. What runs, ends."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _free(self) -> bool:
        return self._making < self._threads and self._sum < self.n_bytes

    def _next(self) -> None:
        while self._waiting and self._free():
            turn = self._waiting.popleft()
            if not turn.done():
                self._making += 1
                turn.set_result(None)


def media_bytes(prepared: Any) -> int:
    """Bytes of the tensors in an input that vLLM's renderer has prepared."""
    from vllm.multimodal.cache.base import MultiModalCache

    items = prepared.get("decoder_prompt", prepared).get("mm_kwargs")
    return int(MultiModalCache.get_item_size(items)) if items else 0
