"""How vLLM's CPU build is laid out on a machine of few cores: it computes on all of them, in one process."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.host.cpu import available_cores, one_of_each
from storage.log_actions import Action
from storage.logs import get_logger

log = get_logger(__name__)

FEW_CORES = 4
"""Up to this many cores, none is kept free of a model's arithmetic."""
PINNED_CORES = 2
"""From this many cores on, its threads are pinned."""
ALL_CORES = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
SHORT_WAITS = {"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
"""As vLLM sets for Intel's OpenMP, whose threads would otherwise spin for 200 ms after each of their tasks."""
BOUND = "VLLM_CPU_OMP_THREADS_BIND"
_engines = itertools.count(os.getpid())


def few_cores() -> int | None:
    """Physical cores that this process may use; ``None`` when they are many, or the user has laid them out."""
    if BOUND in os.environ or any(os.environ.get(name, value) != value for name, value in ALL_CORES.items()):
        return None
    cores = available_cores()
    return cores if cores <= FEW_CORES else None


def arrange(parallel: Any, options: Mapping[str, Any]) -> dict[str, str]:
    """Arrange it in vLLM's ``ParallelConfig``, and in the environment of its processes, which is returned.

    vLLM leaves one core to its scheduler, which waits while the model runs: on few cores that is much of the machine.
    On two, a Llama of 110 million parameters ran 256 prompts 1.6 times as fast on both, and one of a few thousand
    parameters, whose load is Python, as fast as before (``python -m benchmarks.llm --cores own``).

    It also puts the model in a process of its own beside the scheduler's, to pin its threads to cores. In one process
    the engine starts some 10 s sooner (most of it imports), and gives the same tokens; its threads are kept apart
    once it has started (:func:`pin`).
    """
    cores = few_cores()
    if cores is None:
        return {}
    environment = dict(ALL_CORES)
    alone = parallel.world_size == 1 and parallel.data_parallel_size == 1
    # vLLM itself turns a user's "uni" into "mp" here.
    if alone and options.get("distributed_executor_backend") in (None, "uni"):
        parallel.distributed_executor_backend = "uni"
        environment["OMP_NUM_THREADS"] = str(cores)
        if re.search(r"lib(iomp|omp)", os.environ.get("LD_PRELOAD", "")):
            environment |= {name: value for name, value in SHORT_WAITS.items() if name not in os.environ}
        if not parallel.worker_extension_cls:  # the user's own
            parallel.worker_extension_cls = PinnedThreads.NAME
    return environment


async def pin(llm: Any, config: Any) -> None:
    """Keep the threads of an engine that :func:`arrange` put into one process apart, where they and the cores are two.

    Their barriers wait for the slower: both on one core, if only for a moment, cost that moment. On two cores, the same
    prompts ran at 0.95 of the speed of ``LLM.generate``, which pins its threads, without it, at 0.89 with only the
    second thread pinned, and at 0.98 and 1.11 so (medians of five; ``benchmarks/README.md``). More cores were not
    measured.

    The first thread is vLLM's scheduler, too, and what it starts later stays on its core: the engines of a process
    begin with one core and the other in turn.
    """
    cpus = one_of_each()
    ours = config.parallel_config.worker_extension_cls == PinnedThreads.NAME
    if ours and few_cores() == len(cpus) == PINNED_CORES:
        first = next(_engines) % len(cpus)
        cpus = cpus[first:] + cpus[:first]
        (found,) = await llm.collective_rpc("pin_threads", args=(cpus,))
        if found != [[cpu] for cpu in cpus]:
            log.info(
                "vLLM's threads are not pinned to processors %s: they may run on %s",
                cpus,
                found,
                action=Action.ENGINE_UNPINNED,
            )


class PinnedThreads:
    """What vLLM's worker class is extended by, in its process (``worker_extension_cls``): each thread of the model's
    arithmetic on a core of its own.

    vLLM does so where a model has a process to itself, by variables that OpenMP reads when a program begins. Here the
    threads are there already: a parallel region of theirs is entered, and each of them says where it stays.
    """

    NAME = f"{__name__}.PinnedThreads"

    def pin_threads(self, cpus: Sequence[int]) -> list[list[int]]:
        """Keep the n-th thread of this thread's OpenMP team on the n-th of ``cpus``; where each of them now may run.

        For teams of two: of a larger one OpenMP ends threads when it needs fewer, and those that it starts later
        inherit where this thread, the first, may run.

        Nothing is done, and the list is empty, without GNU's OpenMP or a compatible one, or where the team has not as
        many threads.
        """
        program = ctypes.CDLL(None)
        try:
            enter, number, most = program.GOMP_parallel, program.omp_get_thread_num, program.omp_get_max_threads
        except AttributeError:
            return []
        if most() != len(cpus):
            return []
        found: list[list[int]] = [[] for _ in cpus]

        def stay(_: object) -> None:
            mine = number()
            os.sched_setaffinity(0, {cpus[mine]})  # of the calling thread alone
            found[mine] = sorted(os.sched_getaffinity(0))

        # https://github.com/gcc-mirror/gcc/blob/master/libgomp/parallel.c: the function, its argument, as many threads
        # as there are by default, no flags.
        enter(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(stay), None, 0, 0)
        return found
