"""One run of a graph: any thread can stop it, refusals have types of their own, and its buffers may be kept.

Read in ONNX Runtime 1.31 and measured on its CPU build: ``RunOptions.terminate`` ends a run within 0.3 s and latches,
so every run gets options of its own; what ``run`` returns is not copied; an output bound with another shape than the
graph computes is refused, never overrun.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.engines.onnx.runtime import low_precision

Array = npt.NDArray[Any]
T = TypeVar("T")

KEPT_BYTES = 256 * 2**20
"""Most bytes of input and output buffers that a model's runners keep together. Each has an equal share, and drops the
least recently used buffers first."""
QUIET = 4  # only what ends the process: a refused row is reported by us, not on stderr
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class Stopped(Exception):
    """The ``infer`` call that this run belongs to was cancelled or closed."""


class RunFailed(Exception):
    """ONNX Runtime refused these inputs. The message is the runtime's."""


class RunTimedOut(RunFailed):
    """The run took longer than the job allows."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ONNX Runtime, or the device beneath it, could not allocate: it says so in no type of its own."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


_NO_MEMORY = re.compile(
    r"bad_alloc|bad allocation|failed to allocate|out of memory|out_of_memory|alloc_failed|cannot allocate memory",
    re.IGNORECASE,
)


class Deadline:
    """Ends a run after ``seconds``; ``None`` never does. A context manager around the run."""

    def __init__(self, options: Any, seconds: float | None) -> None:
        self._options = options
        self._timer = None if seconds is None else threading.Timer(seconds, self._expire)
        self.expired = False

    def _expire(self) -> None:
        self.expired = True
        self._options.terminate = True

    def __enter__(self) -> Self:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()


class CancelScope:
    """Everything that one ``infer`` has running, so that it can be stopped from any thread."""

    def __init__(self, *, timed: bool = True) -> None:
        """``timed``: whether ``row_timeout`` applies to its runs. It does not apply to the first run of a session,
        in which a device compiles its kernels."""
        self.timed = timed
        self._lock = threading.Lock()
        self._running: set[Any] = set()
        self.stopped = False

    def stop(self) -> None:
        """End the runs in flight and refuse further ones."""
        with self._lock:
            self.stopped = True
            for options in self._running:
                options.terminate = True

    def enter(self, options: Any) -> None:
        with self._lock:
            if self.stopped:
                raise Stopped
            self._running.add(options)

    def leave(self, options: Any) -> None:
        with self._lock:
            self._running.discard(options)


@dataclass(frozen=True, slots=True)
class _IoBuffers:
    """The buffers of one combination of shapes, bound once."""

    binding: Any
    inputs: dict[str, Any]
    output: Any
    n_bytes: int


class SessionRunner:
    """Runs a session from one thread at a time. Other runners may run the same session at the same time.

    With ``binding``, :meth:`run_one` keeps input and output buffers on ``device`` (the one of number ``device_id``),
    one set for each combination of shapes, bound once.
    """

    def __init__(
        self,
        runtime: Any,
        session: Any,
        refusals: tuple[type[Exception], ...],
        *,
        binding: bool = False,
        device: str = "cpu",
        device_id: int = 0,
        seconds: float | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """``seconds``: how long a run may take. ``kept_bytes``: most that its buffers take."""
        self._seconds = seconds
        self._kept_bytes = kept_bytes
        self._runtime = runtime
        self._refusals = refusals
        self.session = session
        self._outputs = {value.name: value.type for value in session.get_outputs()}
        kinds = {value.type for value in [*session.get_inputs(), *session.get_outputs()]}
        strings = "tensor(string)" in kinds
        # ONNX Runtime binds no strings of numpy's. The detour is for graphs that can be fed in no other way.
        self._bindable = not strings or any(map(low_precision.is_low_precision_type, kinds))
        self._device, self._device_id = device, device_id
        self._buffers: OrderedDict[Any, _IoBuffers] = OrderedDict()
        self.binding = binding and not strings
        self.kept_runs = 0

    def run(self, feed: Mapping[str, Array], scope: CancelScope) -> list[Array]:
        """Outputs in graph order. Raises :class:`Stopped`, or :class:`RunFailed` when the runtime refuses the feed
        (:class:`RunTimedOut` when it took too long)."""
        return self._guarded(scope, lambda options: self._fresh(feed, options))

    def run_one(
        self, feed: Mapping[str, Array], output: str, shape: tuple[int, ...] | None, scope: CancelScope
    ) -> Array:
        """The output ``output`` alone, which is to have the shape ``shape`` (``None``: not known).

        The result may be a kept buffer, which the next run overwrites: copy it to keep it. Raises as :meth:`run`.
        """
        if self.binding and shape is not None and self._outputs[output] in _FLOATS:
            try:
                return self._guarded(scope, lambda options: self._kept(feed, output, shape, options))
            except RunTimedOut:
                raise
            except RunFailed:
                # The feed was refused, or the output has another shape: a plain run shows which.
                found = self._guarded(scope, lambda options: self._new(feed, output, options))
                self.binding = False
                self._buffers.clear()
                return found
        return self._guarded(scope, lambda options: self._new(feed, output, options))

    def _guarded(self, scope: CancelScope, work: Callable[[Any], T]) -> T:
        options = self._runtime.RunOptions()
        options.log_severity_level = QUIET
        deadline = Deadline(options, self._seconds if scope.timed else None)
        scope.enter(options)
        try:
            with deadline:
                return work(options)
        except self._refusals as error:
            if scope.stopped:
                raise Stopped from None
            if deadline.expired:
                raise RunTimedOut(f"the run took longer than row_timeout, {self._seconds:g} s") from error
            raise RunFailed(str(error)) from error
        finally:
            scope.leave(options)

    def _new(self, feed: Mapping[str, Array], output: str, options: Any) -> Array:
        return np.asarray(self.session.run([output], dict(feed), options)[0])

    def _fresh(self, feed: Mapping[str, Array], options: Any) -> list[Array]:
        if not self._bindable:
            return [np.asarray(output) for output in self.session.run(None, dict(feed), options)]
        binding = self.session.io_binding()
        for name, array in feed.items():
            low_precision.bind(binding, name, array)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding, options)
        return [np.asarray(low_precision.array_of(value)) for value in binding.get_outputs()]

    def _kept(self, feed: Mapping[str, Array], output: str, shape: tuple[int, ...], options: Any) -> Array:
        key = (output, shape, *((name, array.shape) for name, array in feed.items()))
        buffers = self._buffers.get(key)
        if buffers is None:
            buffers = self._buffers[key] = self._new_buffers(feed, output, shape)
            held = sum(each.n_bytes for each in self._buffers.values())
            while held > self._kept_bytes and len(self._buffers) > 1:
                held -= self._buffers.popitem(last=False)[1].n_bytes
        self._buffers.move_to_end(key)
        for name, array in feed.items():
            buffers.inputs[name].update_inplace(np.ascontiguousarray(array))
        self.session.run_with_iobinding(buffers.binding, options)
        self.kept_runs += 1
        return np.asarray(buffers.output.numpy())  # of a buffer on the CPU, a view

    def _new_buffers(self, feed: Mapping[str, Array], output: str, shape: tuple[int, ...]) -> _IoBuffers:
        make = self._runtime.OrtValue.ortvalue_from_shape_and_type
        binding = self.session.io_binding()
        inputs = {
            name: make(list(array.shape), array.dtype, self._device, self._device_id) for name, array in feed.items()
        }
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        kind = np.dtype(_FLOATS[self._outputs[output]])
        kept = make(list(shape), kind, self._device, self._device_id)
        binding.bind_ortvalue_output(output, kept)
        n_bytes = sum(array.nbytes for array in feed.values()) + int(np.prod(shape)) * kind.itemsize
        return _IoBuffers(binding, inputs, kept, n_bytes)


def filled(array: Array, size: int | None) -> Array:
    """The rows, [n, ...], and copies of the last one until there are ``size``, for a graph that takes no fewer."""
    missing = 0 if size is None else size - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing > 0 else array


class BoundRunner:
    """A session runner, bound to the cancel scope of one ``infer`` call while it works on one batch.

    ``fed``: a list that gets a copy of what the graph is fed.
    """

    def __init__(self, runner: SessionRunner, scope: CancelScope, fed: list[dict[str, Array]] | None = None) -> None:
        self._runner = runner
        self._scope = scope
        self._fed = fed

    def recording(self, fed: list[dict[str, Array]]) -> BoundRunner:
        """The same, with a list that gets what the graph is fed."""
        return BoundRunner(self._runner, self._scope, fed)

    def _record(self, feed: Mapping[str, Array]) -> None:
        if self._fed is not None:
            self._fed.append({name: array.copy() for name, array in feed.items()})

    def __call__(self, feed: Mapping[str, Array]) -> list[Array]:
        """See :meth:`SessionRunner.run`."""
        self._record(feed)
        return self._runner.run(feed, self._scope)

    def one(self, feed: Mapping[str, Array], output: str, shape: tuple[int, ...] | None) -> Array:
        """See :meth:`SessionRunner.run_one`: the next run may overwrite the result."""
        self._record(feed)
        return self._runner.run_one(feed, output, shape, self._scope)
