"""The text tasks (embed, classify, score) on one graph: windows of rows to batches of tokens to result columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.engines import pooled_results as results
from pipeline.engines import pooling
from pipeline.engines.base import ResultBatch, RowBatch, RowFailure
from pipeline.engines.model_config.sentence_layers import Normalize
from pipeline.engines.model_config.sentence_layers import load as load_layers
from pipeline.engines.model_config.text import TextFolder
from pipeline.engines.onnx.models.length_batching import batches_by_length
from pipeline.engines.onnx.models.output_head import (
    Head,
    check_classes,
    check_inputs,
    check_layers,
    head,
    label_column,
    own_embedding,
)
from pipeline.engines.onnx.models.tokenizer import DistinctTexts, TextTokenizer, Tokens, distinct
from pipeline.engines.onnx.runtime.graph_model import GraphModel, finite_rows, runs
from pipeline.engines.onnx.runtime.options import OnnxOptions
from pipeline.engines.onnx.runtime.run import Array, BoundRunner, filled
from pipeline.engines.onnx.runtime.session_pool import SessionPool
from pipeline.engines.onnx.runtime.signature import Signature
from pipeline.engines.onnx.runtime.stream import Batch, Indices, PreparedRows, bisect, record_batch, windows
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidJob, InvalidModel

Floats = npt.NDArray[np.float32]

WINDOW_BYTES = 32 * 2**20


class TextModel(GraphModel):
    """A loaded text graph with its tokenizer. Raises :class:`~storage.errors.InvalidModel` when they do not fit."""

    def __init__(
        self,
        task: Task,
        folder: TextFolder,
        signature: Signature,
        pool: SessionPool,
        options: OnnxOptions,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        super().__init__(pool, options)
        self.task = task
        self._folder = folder
        self._inputs = {value.name: value for value in signature.inputs}
        self._fixed_batch, self._fixed_length = _, length = check_inputs(signature)
        limits = [limit for limit in (folder.max_length, length) if limit is not None]
        self.tokenizer = TextTokenizer(folder, min(limits, default=None))
        self._layers = load_layers(folder.layers)
        self._masked = "attention_mask" in self._inputs
        if not self._masked and length is not None:
            notify(
                f"the graph takes {length} tokens and no attention_mask: unless it leaves out token "
                f"{self.tokenizer.pad_id} itself, what fills a shorter text up counts as text"
            )
        self._states = head(task, signature)
        own = own_embedding(signature) if task is Task.EMBED and folder.pooling is None else None
        self._own = own or self._states
        self.token_budget = pool.layout.token_budget
        self._sample = self.tokenizer.encode([("a",)], truncate=True)
        if not len(self._sample.ids):
            self._sample = Tokens(
                np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.int64), np.zeros(1, bool), {}
            )
        self._widths: dict[str, int] = {}
        self._widths = {used.name: self._measure_width(used) for used in {self._states, self._own}}
        if task is Task.EMBED:
            check_layers(folder, self._own, self._widths[self._own.name])
        width = self._widths[self._states.name]
        check_classes(task, width, options.labels)
        self._labels = label_column(folder.config, width, options.labels)

    def facts(self) -> dict[str, Any]:
        limits = {"token_budget": self.token_budget, "max_length": self.tokenizer.max_length}
        return {"output": self._own.name, **limits, **self.counts}

    def _head(self, spec: JobSpec) -> Head:
        return self._own if spec.pooling == "auto" else self._states

    def _measure_width(self, used: Head) -> int:
        """One run before the first row: proves that graph and tokenizer fit, and tells the width of the output."""
        one = np.zeros(1, np.int64)
        out = self.first_run(lambda run: self._forward(run, used, self._sample, one), "a tokenized text")
        return int(out.shape[-1])

    def result_schema(self, spec: JobSpec) -> pa.Schema:
        fields: list[Any]
        match self.task:
            case Task.EMBED:
                fields = [
                    pa.field("embedding", results.embedding_type(spec, self._kept_width(spec))),
                    pa.field("prompt_tokens", pa.int32()),
                ]
            case Task.CLASSIFY:
                fields = results.classify_fields()
            case _:
                fields = [pa.field("score", pa.float32())]
        return pa.schema(fields)

    def _kept_width(self, spec: JobSpec) -> int:
        width, kept = self._vector_width(spec), self._folder.truncate_dim
        return width if kept is None or spec.dimensions is not None else min(width, kept)

    def _modes(self, spec: JobSpec) -> tuple[str, ...]:
        if spec.pooling != "auto":
            if self._states.rank == 2:
                raise InvalidJob("the graph pools by itself; leave pooling at 'auto'", field="pooling")
            return (spec.pooling,)
        return self._folder.pooling or ("mean",)

    def _prompt(self, spec: JobSpec) -> str:
        return self._folder.prompts.of(spec) if self.task is Task.EMBED else ""

    def prepare(self, spec: JobSpec, batches: Iterable[RowBatch]) -> Iterator[PreparedRows]:
        columns = [name for name in (spec.column, spec.pair_column) if name is not None]
        prompt = self._prompt(spec)
        for rows, parts in windows(batches, self._options.window_rows, WINDOW_BYTES):
            texts = distinct(parts, columns)
            truncate = spec.overlong not in ("error", "split")
            tokens = self.tokenizer.encode(texts.texts, truncate=truncate, prompt=prompt)
            pieces = self.tokenizer.split(texts.texts, tokens, prompt) if spec.overlong == "split" else {}
            yield self._window(spec, rows, texts, tokens, pieces)

    def _window(
        self, spec: JobSpec, rows: Indices, texts: DistinctTexts, tokens: Tokens, pieces: Mapping[int, Tokens]
    ) -> PreparedRows:
        failures = [RowFailure(int(rows[at]), *failure) for at, failure in texts.failures.items()]
        # Rows grouped by text: those of text u are grouped[bounds[u]:bounds[u + 1]].
        members = np.argsort(texts.of_row, kind="stable")[int((texts.of_row < 0).sum()) :]
        repeats = np.bincount(texts.of_row[members], minlength=len(texts.texts)).astype(np.int64)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(repeats)])
        grouped = rows[members]

        def rows_of(text: int) -> Indices:
            return grouped[bounds[text] : bounds[text + 1]]

        for text, failure in tokens.failures.items():
            failures += [RowFailure(int(row), *failure) for row in rows_of(text)]
        good = np.flatnonzero(tokens.lengths > 0)
        self.count(
            rows=len(rows),
            prompt_tokens=int((tokens.lengths * repeats).sum()),
            truncated_rows=int(repeats[tokens.truncated].sum()),
            duplicate_rows=int((repeats[good] - 1).sum()),
        )

        def packed(budget: int, every: int = 1) -> list[Batch]:
            # Every n-th by length: the lengths of the sample are spread as those of the window.
            some = good if every == 1 else good[np.argsort(tokens.lengths[good], kind="stable")[::every]]
            batches = [
                self._batch(spec, tokens, some[batch], rows_of, budget)
                for batch in self._batches_of(tokens.lengths[some], budget)
            ]
            # Longer texts than the model takes, in pieces; no part of a sample.
            return batches + (long if every == 1 else [])

        long = [self._pieces(spec, rows_of(text), pieces[text]) for text in sorted(pieces)]
        return PreparedRows(packed(self.token_budget), tuple(failures), packed)

    def _pieces(self, spec: JobSpec, rows: Indices, tokens: Tokens) -> Batch:
        """The work on one text that is longer than the model's limit. ``rows``: those that have it."""

        def compute(run: BoundRunner) -> ResultBatch:
            vectors = np.zeros((len(tokens.lengths), self._vector_width(spec)), np.float32)
            for batch in self._batches_of(tokens.lengths, self.token_budget):
                parts, refused = bisect(
                    lambda part: self._vectors(spec, self._head_output(run, spec, tokens, part), tokens.lengths[part]),
                    batch,
                    lambda: self._still_works(run),
                )
                if refused:
                    failures = tuple(RowFailure(int(row), *refused[0][1:]) for row in rows)
                    return ResultBatch(np.empty(0, np.int64), None, failures)
                for part, made in parts:
                    vectors[part] = made
            weights = tokens.lengths / tokens.lengths.sum()
            mean = (weights[None, :] @ vectors.astype(np.float64)).astype(np.float32)
            if not results.finite(mean)[0]:
                failures = tuple(RowFailure(int(row), *results.NOT_FINITE) for row in rows)
                return ResultBatch(np.empty(0, np.int64), None, failures)
            stored = {"embedding": np.repeat(self._stored(spec, mean), len(rows), axis=0)}
            lengths = np.full(len(rows), int(tokens.lengths.sum()))
            self.count(split_rows=len(rows), prompt_tokens=int(lengths.sum()))
            return ResultBatch(rows, self._values(spec, stored, lengths))

        return compute

    def _batch(
        self, spec: JobSpec, tokens: Tokens, items: Indices, rows_of: Callable[[int], Indices], budget: int
    ) -> Batch:
        def compute(run: BoundRunner) -> ResultBatch:
            parts, refused = bisect(
                lambda part: self._columns(spec, self._head_output(run, spec, tokens, part), tokens.lengths[part]),
                items,
                lambda: self._still_works(run),
            )
            if len(parts) > 1 and not refused:
                self._too_large(budget)
            done, made = finite_rows(parts, refused)
            failures = tuple(RowFailure(int(row), *why) for text, *why in refused for row in rows_of(text))
            if not len(done):
                return ResultBatch(done, None, failures)
            rows = [rows_of(text) for text in done]
            repeats = np.array([len(those) for those in rows])
            kept = {name: np.repeat(column, repeats, axis=0) for name, column in made.items()}
            values = self._values(spec, kept, np.repeat(tokens.lengths[done], repeats))
            return ResultBatch(np.concatenate(rows), values, failures)

        return compute

    def _too_large(self, budget: int) -> None:
        """A batch of this budget failed whole and passed in halves: use half of it from now on."""
        with self._lock:
            if self.token_budget == budget:
                self.token_budget = max(1, budget // 2)
                self.counts["budget_halvings"] += 1

    def _batches_of(self, lengths: Indices, budget: int) -> list[Indices]:
        rows = self._options.max_batch
        if self._fixed_batch is not None:
            rows = min(rows, self._fixed_batch)
        if self._fixed_length is not None:
            lengths = np.full_like(lengths, self._fixed_length)
        elif not self._masked:  # padding would be text to the graph, and a row's result depend on its batch
            groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)[::-1]]
            return [group[part] for group in groups for part in batches_by_length(lengths[group], budget, rows)]
        return batches_by_length(lengths, max(budget, self._fixed_length or 1), rows)

    def _head_output(self, run: BoundRunner, spec: JobSpec, tokens: Tokens, items: Indices) -> Floats:
        """The head's output for the texts ``items``, float32 [k, s, d] or [k, d]."""
        out = self._forward(run, self._head(spec), tokens, items)
        self.count(runs=1, padded_tokens=len(items) * int(tokens.lengths[items].max()))
        return out

    def _still_works(self, run: BoundRunner) -> bool:
        """Whether the session computes what it computed when it was loaded."""
        return runs(lambda: self._forward(run, self._own, self._sample, np.zeros(1, np.int64)))

    def _forward(self, run: BoundRunner, used: Head, tokens: Tokens, items: Indices) -> Floats:
        feed = self._feed(tokens, items)
        output = run.one(feed, used.name, self._shape_of_output(used, feed))[: len(items)]
        if output.ndim != used.rank or len(output) != len(items):
            raise InvalidModel(
                f"graph output {used.name!r} has shape {list(output.shape)} for {len(items)} texts; "
                f"expected {used.rank} axes, the first of them over the texts"
            )
        # A vector for each text is copied: it must not lie in a buffer that the next run overwrites.
        return output.astype(np.float32, copy=used.rank == 2)

    def _shape_of_output(self, used: Head, feed: dict[str, Array]) -> tuple[int, ...] | None:
        shape = feed["input_ids"].shape
        width = self._widths.get(used.name)
        if width is None:  # the first run tells
            return None
        return (*shape, width) if used.rank == 3 else (shape[0], width)

    def _feed(self, tokens: Tokens, items: Indices) -> dict[str, Array]:
        lengths = tokens.lengths[items]
        n, width = len(items), self._fixed_length or int(lengths.max())
        mask = np.arange(width)[None, :] < lengths[:, None]
        starts = tokens.starts[items]
        source = (starts[:, None] + np.arange(width)[None, :])[mask]
        feed: dict[str, Array] = {}
        for name, value in self._inputs.items():
            array: Array
            if name == "attention_mask":
                array = mask.astype(value.dtype)
            elif name == "position_ids":
                array = np.broadcast_to(np.arange(width, dtype=value.dtype), (n, width)).copy()
            else:
                flat, fill = (tokens.ids, self.tokenizer.pad_id) if name == "input_ids" else (tokens.types, 0)
                array = np.full((n, width), fill, dtype=value.dtype)
                array[mask] = flat[source]
            feed[name] = filled(array, self._fixed_batch)
        return feed

    def _vectors(self, spec: JobSpec, out: Floats, lengths: Indices) -> Floats:
        """Sentence embeddings of the model, before they are scaled to unit length, float32 [k, width]."""
        if self._head(spec).rank == 2:  # the graph has applied the layers, see check_layers
            return out
        start = 0 if self._folder.include_prompt else self.tokenizer.prompt_length(self._prompt(spec))
        return self._layers(pooling.pool(out, lengths, self._modes(spec), start))

    def _vector_width(self, spec: JobSpec) -> int:
        """Numbers in a vector of :meth:`_vectors`. Raises :class:`~storage.errors.InvalidJob` for a pooling that gives
        other vectors than the model's layers take."""
        used = self._head(spec)
        if used.rank == 2:
            return self._widths[used.name]
        width = self._widths[used.name] * len(self._modes(spec))
        for layer in self._folder.layers:
            if isinstance(layer, Normalize):
                continue
            if layer.n_in != width:
                raise InvalidJob(
                    f"it gives {width} numbers; the model's {layer.folder.name} takes {layer.n_in}", field="pooling"
                )
            width = layer.n_out
        return width

    def _stored(self, spec: JobSpec, vectors: Floats) -> Array:
        """Sentence embeddings as the job wants them (see :func:`.pooled_results.finished`)."""
        folder = self._folder
        if folder.truncate_dim is not None and spec.dimensions is None:
            # As in encode(): the model's own unit length comes before its own truncation.
            own = pooling.unit_length(vectors) if folder.normalize and spec.normalize is not False else vectors
            vectors = own[:, : folder.truncate_dim]
        return results.finished(spec, vectors, normalize=folder.unit_length(spec))

    def _columns(self, spec: JobSpec, out: Floats, lengths: Indices) -> dict[str, npt.NDArray[Any]]:
        """What is kept of a batch, per text: ``embedding`` [k, d], ``probabilities`` [k, labels] or ``score`` [k]; and
        ``finite``, bool [k]: whether these are numbers."""
        match self.task:
            case Task.EMBED:
                vectors = self._vectors(spec, out, lengths)
                finite = results.finite(vectors)
                return {"embedding": self._stored(spec, np.where(finite[:, None], vectors, 0)), "finite": finite}
            case Task.CLASSIFY:
                softmax = self._folder.class_activation(out.shape[1]) == "softmax"
                p = pooling.softmax(out) if softmax else pooling.sigmoid(out)
                return {"probabilities": p, "finite": results.finite(p)}
            case _:
                sigmoid = self._folder.score_activation() == "sigmoid"
                score = (pooling.sigmoid(out) if sigmoid else out)[:, 0]
                return {"score": score, "finite": np.isfinite(score)}

    def _values(self, spec: JobSpec, columns: dict[str, npt.NDArray[Any]], lengths: Indices) -> pa.RecordBatch:
        """Result rows, from what :meth:`_columns` kept, already one per row."""
        schema = self.result_schema(spec)
        match self.task:
            case Task.EMBED:
                arrays: dict[str, Any] = {
                    "embedding": results.embedding_column(columns["embedding"]),
                    "prompt_tokens": pa.array(lengths.astype(np.int32)),
                }
            case Task.CLASSIFY:
                arrays = results.classify_columns(spec, columns["probabilities"], self._labels)
            case _:
                arrays = {"score": pa.array(np.ascontiguousarray(columns["score"]))}
        return record_batch(arrays, schema)
