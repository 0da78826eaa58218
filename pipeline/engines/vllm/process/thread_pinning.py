"""In vLLM's process: each thread of the model's arithmetic on a core of its own.

vLLM does so where a model has a process to itself, by variables that OpenMP reads when a program begins. Here the
threads are there already: a parallel region of theirs is entered, and each of them says where it stays.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

NAME = f"{__name__}.PinnedThreads"


class PinnedThreads:
    """What vLLM's worker class is extended by (``worker_extension_cls``)."""

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
