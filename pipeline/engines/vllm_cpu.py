"""How vLLM's CPU build is laid out on a machine of few cores: it computes on all of them, in one process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import psutil

from pipeline.engines import environ

FEW_CORES = 4
"""Up to so many cores, none is kept free of a model's arithmetic."""
ALL_CORES = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
OPENMP = ("OMP_", "GOMP_", "KMP_")
"""What the variables of OpenMP begin with: the standard's, GNU's and Intel's."""
BOUND = "VLLM_CPU_OMP_THREADS_BIND"


def few_cores() -> int | None:
    """Physical cores that this process may use; ``None`` when they are many, or the user has laid them out."""
    if BOUND in os.environ or any(os.environ.get(name, value) != value for name, value in ALL_CORES.items()):
        return None
    usable = len(os.sched_getaffinity(0))
    cores = min(usable, psutil.cpu_count(logical=False) or usable)
    return cores if cores <= FEW_CORES else None


def pinned(config: Any) -> dict[str, str]:
    """What vLLM sets where a model has a process of its own, so that each of its threads stays on a core of its own:
    for all cores of ``config``'s only rank.

    Without it, one process took 3 to 5% longer (medians, noisy) over the same prompts (``benchmarks/README.md``).
    """
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    with environ.holding(ALL_CORES), OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0):
        return {name: value for name, value in os.environ.items() if name.startswith(OPENMP)}


def arrange(config: Any, options: Mapping[str, Any]) -> dict[str, str]:
    """Arrange it in vLLM's configuration, and in the environment of its processes, which is returned.

    vLLM leaves one core to its scheduler, which waits while the model runs: on few cores that is much of the machine.
    On two, a Llama of 110 million parameters ran 256 prompts 1.6 times as fast on both, and one of a few thousand
    parameters, whose load is Python, as fast as before (``benchmarks/llm.py --cores own``).

    It also puts the model in a process of its own beside the scheduler's, to pin its threads to cores. They are pinned
    in one process just as well, if that is told before it starts: it starts some 10 s sooner (25 s against 31 to 37 on
    two cores, most of it imports), and gives the same tokens at least as fast.
    """
    if few_cores() is None:
        return {}
    parallel = config.parallel_config
    alone = parallel.world_size == 1 and parallel.data_parallel_size == 1
    # vLLM itself turns a user's "uni" into "mp" here.
    if alone and options.get("distributed_executor_backend") in (None, "uni"):
        parallel.distributed_executor_backend = "uni"
        return ALL_CORES | pinned(config)
    return dict(ALL_CORES)
