"""The image tasks (embed, classify) on one graph: rows of images to batches of pixels to result columns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.engines import pooled_results as results
from pipeline.engines import pooling
from pipeline.engines.base import ResultBatch, RowBatch, RowFailure
from pipeline.engines.media.images import ImageReader, png
from pipeline.engines.model_config.image import ImageFolder
from pipeline.engines.model_config.text import class_activation
from pipeline.engines.onnx.models.output_head import check_classes, label_column
from pipeline.engines.onnx.runtime.graph_model import GraphModel, finite_rows, runs
from pipeline.engines.onnx.runtime.options import OnnxOptions
from pipeline.engines.onnx.runtime.run import Array, BoundRunner, filled
from pipeline.engines.onnx.runtime.session_pool import SessionPool
from pipeline.engines.onnx.runtime.signature import GraphValue, Signature
from pipeline.engines.onnx.runtime.stream import Batch, Indices, PreparedRows, bisect, record_batch, windows
from pipeline.host.cpu import available_cores
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidJob, InvalidModel

Floats = npt.NDArray[np.float32]

CPU_BATCH = 8
GPU_BATCH = 64
"""Images in a batch; ``max_batch`` makes it smaller."""
WINDOW_BYTES = 32 * 2**20
"""Most encoded bytes that are decoded together; ``BATCHES_AHEAD`` batches are another limit."""
BATCHES_AHEAD = 4
DECODED_BYTES = 256 * 2**20
"""A window, and a batch, ends when the model's inputs take this many bytes, plus what is decoded at a time."""

POOLED = "the graph pools by itself; leave it at 'auto'"
_EMBEDDINGS = ("image_embeds", "image_embedding", "pooler_output", "last_hidden_state")


def image_input(signature: Signature) -> GraphValue | None:
    """The graph's one input of images, [n, 3, h, w] or [n, h, w, 3] of floats; ``None`` for any other graph."""
    if len(signature.inputs) != 1:
        return None
    value = signature.inputs[0]
    floats = value.dtype in (np.dtype(np.float32), np.dtype(np.float16))
    dims = value.dims
    pictures = floats and dims is not None and len(dims) == 4 and (dims[1] in (3, None) or channels_last(value))
    return value if pictures or _named(value) else None


def channels_last(value: GraphValue) -> bool:
    """Whether an input of images is [n, h, w, 3]: three at the end, and not three (channels) in front of it."""
    return value.dims is not None and len(value.dims) == 4 and value.dims[3] == 3 and value.dims[1] != 3


def _named(value: GraphValue) -> bool:
    return value.name == "pixel_values" and value.dims is not None and len(value.dims) == 4


def image_head(task: Task, signature: Signature) -> int:
    """The position of the output that the task reads. Raises :class:`~storage.errors.InvalidModel` for none."""
    names = [value.name for value in signature.outputs]
    for name in ("logits",) if task is Task.CLASSIFY else _EMBEDDINGS:
        if name in names:
            return names.index(name)
    ranks = (2,) if task is Task.CLASSIFY else (2, 3, 4)
    for rank in ranks:
        for position, value in enumerate(signature.outputs):
            if value.dims is not None and len(value.dims) == rank and value.name != "logits":
                return position
    raise InvalidModel(f"task '{task}' on images finds no output to read in {signature}", field="model")


def token_states(signature: Signature) -> int | None:
    """The position of the output that a job may ask to pool, a vector for each patch; ``None`` where there is none."""
    named, others = [], []
    for at, value in enumerate(signature.outputs):
        if value.name == "last_hidden_state" and (value.dims is None or len(value.dims) == 3):
            named.append(at)
        elif value.dims is not None and len(value.dims) == 3:
            others.append(at)
    return next(iter(named or others), None)


class ImageModel(GraphModel):
    """A loaded image graph. Raises :class:`~storage.errors.InvalidModel` when graph and recipe do not fit."""

    def __init__(
        self,
        task: Task,
        folder: ImageFolder,
        signature: Signature,
        pool: SessionPool,
        options: OnnxOptions,
        fetch: Callable[[str], bytes] | None,
    ) -> None:
        value = image_input(signature)
        if value is None:
            raise InvalidModel(
                f"the graph takes no images, [n, 3, height, width] or [n, height, width, 3]: {signature}", field="model"
            )
        super().__init__(pool, options)
        self.task = task
        self._input = value
        self._folder = folder
        self._measuring = threading.Lock()
        self._own = image_head(task, signature)
        self._states = token_states(signature) if task is Task.EMBED else None
        self.output = signature.outputs[self._own].name
        self._names = [value.name for value in signature.outputs]
        first = (value.dims or (None,))[0]
        self._fixed_batch = first if isinstance(first, int) else None
        self.batch = self._fixed_batch or min(options.max_batch, CPU_BATCH if pool.on_cpu else GPU_BATCH)
        self._reader = ImageReader(folder.recipe, fetch, available_cores())
        try:
            self._sample = self._reader.prepare(_grey())
            self._shapes = {self._own: self._measure(self._own)}
        except BaseException:
            self.close()
            raise
        width, _ = self._shapes[self._own]
        check_classes(task, width, options.labels)
        self._labels = label_column(folder.config, width, options.labels)

    def close(self) -> None:
        super().close()
        self._reader.close()

    def _measure(self, head: int) -> tuple[int, int]:
        """One run before the first row: proves that graph and recipe fit, and tells an output's width and its axes."""
        shape = list(self._sample.shape)
        out = self.first_run(
            lambda run: self._forward(run, self._sample[None], head),
            f"an image of shape {shape}, as the recipe makes it",
        )
        ranks = (2,) if self.task is Task.CLASSIFY else (2, 3, 4)
        if out.ndim not in ranks or (out.ndim == 4 and out.shape[2:] != (1, 1)):
            raise InvalidModel(
                f"graph output {self._names[head]!r} has shape {list(out.shape)} for one image", field="model"
            )
        return int(out.shape[1] if out.ndim == 4 else out.shape[-1]), out.ndim

    def facts(self) -> dict[str, Any]:
        return {"output": self.output, "image_batch": self.batch, **self.counts}

    def result_schema(self, spec: JobSpec) -> pa.Schema:
        if self.task is Task.CLASSIFY:
            return pa.schema(results.classify_fields())
        return pa.schema([pa.field("embedding", results.embedding_type(spec, self._shapes[self._head(spec)][0]))])

    def _head(self, spec: JobSpec) -> int:
        """The output that the job reads. Raises :class:`~storage.errors.InvalidJob` for a pooling of what is none."""
        if spec.pooling == "auto" or self.task is not Task.EMBED:
            return self._own
        if self._states is None:
            raise InvalidJob(POOLED, field="pooling")
        with self._measuring:  # only when a job asks: another output need not have one row per image
            if self._states not in self._shapes:
                self._shapes[self._states] = self._measure(self._states)
        if self._shapes[self._states][1] != 3:
            raise InvalidJob(POOLED, field="pooling")
        return self._states

    def prepare(self, spec: JobSpec, batches: Iterable[RowBatch]) -> Iterator[PreparedRows]:
        assert spec.column is not None
        size = BATCHES_AHEAD * self.batch * max(1, self._pool.size // 2)
        for rows, parts in windows(batches, size, WINDOW_BYTES):
            images: list[Any] = []
            decoded = at = 0
            for part in parts:
                step = self.batch  # a lane may halve it meanwhile
                for start in range(0, part.num_rows, step):
                    some = self._reader.read(part.column(spec.column).slice(start, step), spec.column)
                    images += some
                    decoded += sum(image.nbytes for image in some if not isinstance(image, tuple))
                    if decoded >= DECODED_BYTES:
                        yield self._window(spec, rows[at : at + len(images)], images)
                        images, decoded, at = [], 0, at + len(images)
            if images:
                yield self._window(spec, rows[at:], images)

    def _window(self, spec: JobSpec, rows: Indices, images: list[Any]) -> PreparedRows:
        failed = {at: image for at, image in enumerate(images) if isinstance(image, tuple)}
        # A recipe without a resize leaves images of several sizes: only equal ones are stacked.
        sizes: dict[tuple[int, ...], list[int]] = {}
        for at, image in enumerate(images):
            if at not in failed:
                sizes.setdefault(image.shape, []).append(at)
        batches = []
        for members in sizes.values():
            most = max(1, min(self.batch, DECODED_BYTES // images[members[0]].nbytes))
            batches += [
                self._batch(spec, rows, images, np.array(members[start : start + most], np.int64))
                for start in range(0, len(members), most)
            ]
        self.count(rows=len(rows))
        return PreparedRows(batches, tuple(RowFailure(int(rows[at]), *failure) for at, failure in failed.items()))

    def _batch(self, spec: JobSpec, rows: Indices, images: list[Any], items: Indices) -> Batch:
        head = self._head(spec)

        def compute(run: BoundRunner) -> ResultBatch:
            parts, refused = bisect(
                lambda part: self._numbers(spec, self._forward(run, np.stack([images[at] for at in part]), head), head),
                items,
                lambda: runs(lambda: self._forward(run, self._sample[None], self._own)),
            )
            if len(parts) > 1 and not refused:
                self._too_large(len(items))
            done, made = finite_rows(parts, refused)
            failures = tuple(RowFailure(int(rows[at]), code, message) for at, code, message in refused)
            if not len(done):
                return ResultBatch(done, None, failures)
            return ResultBatch(rows[done], self._values(spec, made["numbers"]), failures)

        return compute

    def _forward(self, run: BoundRunner, images: Floats, head: int) -> Array:
        n = len(images)
        feed = filled(images.astype(self._input.dtype, copy=False), self._fixed_batch)
        if channels_last(self._input):
            feed = np.ascontiguousarray(feed.transpose(0, 2, 3, 1))
        output = run({self._input.name: feed})[head][:n]
        self.count(runs=1)
        if not output.ndim or len(output) != n:
            raise InvalidModel(f"graph output {self._names[head]!r} has shape {list(output.shape)} for {n} images")
        return output

    def _numbers(self, spec: JobSpec, output: Array, head: int) -> dict[str, Array]:
        """``numbers``: probabilities or embeddings as the model gives them, float32 [k, width]; and ``finite``."""
        out = output.astype(np.float32, copy=False)
        width, rank = self._shapes[head]
        if self.task is Task.CLASSIFY:
            softmax = class_activation(self._folder.config, width) == "softmax"
            out = pooling.softmax(out) if softmax else pooling.sigmoid(out)
        elif rank == 3:
            out = out.mean(axis=1) if spec.pooling == "mean" else out[:, -1 if spec.pooling == "last" else 0]
        out = out.reshape(len(out), width)
        return {"numbers": out, "finite": results.finite(out)}

    def _values(self, spec: JobSpec, numbers: Floats) -> pa.RecordBatch:
        if self.task is Task.CLASSIFY:
            return record_batch(results.classify_columns(spec, numbers, self._labels), self.result_schema(spec))
        stored = results.finished(spec, numbers, normalize=bool(spec.normalize))
        return record_batch({"embedding": results.embedding_column(stored)}, self.result_schema(spec))

    def _too_large(self, n_rows: int) -> None:
        with self._lock:
            if self._fixed_batch is None and self.batch >= n_rows:
                self.batch = max(1, n_rows // 2)
                self.counts["batch_halvings"] += 1


def _grey() -> bytes:
    """A small encoded image, so that the sample goes the way of every row."""
    import PIL.Image

    return png(PIL.Image.new("RGB", (256, 256), (128, 128, 128)))
