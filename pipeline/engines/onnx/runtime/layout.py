"""Pure: how a graph's batches are laid out over the machine, and which other layouts are worth a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.engines.onnx.runtime.options import OnnxOptions

CPU_TOKENS = 512
GPU_TOKENS = 16_384
"""Padded tokens in a batch of texts, unmeasured. On two cores with all-MiniLM-L6-v2: 256 to 512 best, 1,024 a tenth
slower, 16,384 a quarter."""
_CPU_BUDGETS = (256, 512, 1024, 2048)
_GPU_BUDGETS = (4096, 16_384, 65_536)


@dataclass(frozen=True, slots=True)
class Layout:
    """``sessions`` copies of the model, ``lanes`` batches side by side on each, ``threads`` on each batch;
    ``token_budget`` padded tokens in a batch of texts; ``io_binding``: into kept buffers."""

    sessions: int
    lanes: int
    threads: int
    token_budget: int
    io_binding: bool

    def __str__(self) -> str:
        spread = f"{self.sessions} sessions × {self.lanes} lanes × {self.threads} threads"
        buffers = "kept" if self.io_binding else "new"
        return f"{spread}, {self.token_budget} tokens, {buffers} buffers"

    @classmethod
    def default(cls, options: OnnxOptions, cores: int, *, on_cpu: bool) -> Layout:
        """On a CPU: one copy of the model, and one thread for each core, each with a batch of its own. That is twice as
        fast as all threads on one batch, and as fast as a copy for each thread. On a GPU: one batch at a time."""
        threads, sessions = options.threads or 1, options.sessions or 1
        lanes = max(1, cores // (threads * sessions)) if on_cpu else 1
        budget = options.token_budget or (CPU_TOKENS if on_cpu else GPU_TOKENS)
        binding = options.io_binding if options.io_binding is not None else not on_cpu
        return cls(sessions, options.lanes or lanes, threads, budget, binding)

    @classmethod
    def from_json(cls, value: Any) -> Layout:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for what :meth:`to_json` did not write."""
        numbers = {name: int(value[name]) for name in ("sessions", "lanes", "threads", "token_budget")}
        if min(numbers.values()) < 1:
            raise ValueError(f"not a layout: {value!r}")
        return cls(**numbers, io_binding=bool(value["io_binding"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def obeying(self, options: OnnxOptions) -> Layout:
        """This layout, with the values that the options fix."""
        names = ("sessions", "lanes", "threads", "token_budget", "io_binding")
        return replace(self, **{n: v for n in names if (v := getattr(options, n)) is not None})


def fixed(options: OnnxOptions, *, text: bool) -> bool:
    """Whether the options leave nothing to measure."""
    names = ("sessions", "lanes", "threads", *(("token_budget",) if text else ()))
    return not options.autotune or all(getattr(options, name) is not None for name in names)


def rivals(base: Layout, options: OnnxOptions, cores: int, copies: int, *, on_cpu: bool) -> Iterator[Layout]:
    """Other ways to spread batches over ``cores``. At most ``copies`` sessions fit into memory."""
    ways: list[tuple[int, int, int]] = []
    if on_cpu:
        ways = [(cores, 1, 1), (1, cores, 1), (1, 1, cores)]
        if cores >= 4:
            ways += [(1, cores // 2, 2), (cores // 2, 1, 2)]
        if cores >= 16:
            ways += [(1, cores // 4, 4), (cores // 4, 1, 4)]
    else:
        ways = [(1, 2, 1)]
    seen = {base}
    for sessions, lanes, threads in ways:
        found = replace(base, sessions=sessions, lanes=lanes, threads=threads).obeying(options)
        if found not in seen and found.sessions <= max(1, copies):
            seen.add(found)
            yield found


def budgets(base: Layout, options: OnnxOptions, *, on_cpu: bool) -> Iterator[Layout]:
    """The same layout with other batch sizes."""
    if options.token_budget is None:
        for tokens in _CPU_BUDGETS if on_cpu else _GPU_BUDGETS:
            if tokens != base.token_budget:
                yield replace(base, token_budget=tokens)
