"""Rows whose answers are cached across jobs (``cache``): which may be, under which key, and how they come back."""

from __future__ import annotations

import time
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engines.base import EngineContext, ResultBatch
from pipeline.engines.vllm import pooling
from pipeline.engines.vllm.generate_results import Answer
from pipeline.engines.vllm.options import permissions
from pipeline.engines.vllm.options.engine_args import ENGINE, OWN_OPTIONS
from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.engines.vllm.prompts.prompts import Prompt
from pipeline.engines.vllm.requests.dedup import dedup_keys, is_deterministic
from pipeline.models.model import Model
from pipeline.result_cache.keys import row_key
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidJob

FIELD = "cache"
HIT_ROWS, HIT_TOKENS = 8192, 2**22
"""Hits, and the tokens of their prompts, that gather before their answers are read, to read each row group once."""

_CACHE = ENGINE.having("cache")
SPEED = OWN_OPTIONS.keys() | {name for name, effect in _CACHE.items() if effect == "speed"}
"""Engine options that say how fast, and not what. As everywhere, the batch may decide a tie in the last bits."""


def check(spec: JobSpec) -> None:
    """Raise :class:`InvalidJob` where answers to this job cannot be cached, or would surprise whoever asks again."""
    if spec.cache == "off":
        return
    if spec.image_column or spec.audio_column or spec.video_column:
        raise InvalidJob("answers about images, sounds and videos are not cached; leave it off", field=FIELD)
    outside = sorted(
        name
        for name, value in spec.engine_options.items()
        if _CACHE.get(name) == "outside" or (permissions.depends_on_value(name) and permissions.risk(name, value))
    )
    if outside:
        raise InvalidJob(
            f"answers under the engine option {outside[0]!r} are not cached, since they depend on files that the "
            "model's digest does not cover; leave it off",
            field=FIELD,
        )
    by_row = {"temperature", "seed"} & spec.sampling_columns.keys()
    if spec.cache == "on" and spec.task not in pooling.TASKS and not is_deterministic(spec.sampling) and not by_row:
        raise InvalidJob(
            "these answers are drawn at random: set temperature to 0 or a seed (--sampling temperature=0), or ask for "
            'the same draws again with cache="sampled" (--cache-sampled)',
            field=FIELD,
        )


def facts(running: RunningVllm, model: Model, versions: Mapping[str, str], spec: JobSpec) -> dict[str, Any]:
    """All that the answers to a job's rows depend on, except for the rows and the tenant. Plain JSON.

    Templates, tools and the cutting of long prompts are in the rows' tokens.
    """
    config = running.config
    return {
        "engine": "vllm",
        "versions": dict(versions),
        "device": config.device_config.device_type,
        "dtype": str(config.model_config.dtype),
        "max_model_len": config.model_config.max_model_len,
        "model": model.digest,
        "options": {name: value for name, value in spec.engine_options.items() if name not in SPEED},
        "task": str(spec.task),
        "sampling": {name: value for name, value in spec.sampling.items() if value is not None},
        "embedding": [spec.normalize, spec.dimensions, spec.embedding_type, spec.top_k],
    }


class CacheLookup:
    """The rows of one call. :meth:`partition_hits` and :meth:`read_hits` are for the thread that makes prompts,
    :meth:`store` for the one that reads answers."""

    def __init__(
        self, context: EngineContext, running: RunningVllm, model: Model, versions: Mapping[str, str], spec: JobSpec,
        schema: pa.Schema, *, pairs: bool,
    ) -> None:  # fmt: skip
        assert context.results is not None
        self._schema = schema
        self._cache = context.results.open(spec.tenant, facts(running, model, versions, spec), schema)
        self._per_row = 2 if pairs else 1
        sampled = spec.cache == "sampled"
        self._dedup_key = dedup_keys(
            pools=spec.task in pooling.TASKS,
            is_deterministic=sampled or is_deterministic(spec.sampling),
            sampled=sampled,
        )
        self._run: dict[int, bytes] = {}  # the rows that are being run → their keys
        self._hits: list[tuple[bytes, int, list[Prompt]]] = []
        self._tokens = 0
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._given: Mapping[str, float] = {}

    def partition_hits(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts that have to be run now. The others have a cached answer, it seems, and wait for it."""
        began = time.monotonic()
        rows = [list(group) for _, group in groupby(prompts, lambda prompt: prompt.row // self._per_row)]
        keys = [self._key(row) for row in rows]
        asked = [key for key in keys if key is not None]
        offsets = iter(self._cache.find(asked).tolist())
        run: list[Prompt] = []
        for row, key in zip(rows, keys, strict=True):
            offset = -1 if key is None else next(offsets)
            if key is not None and offset >= 0:
                self._hits.append((key, offset, row))
                self._tokens += sum(len(prompt.tokens) for prompt in row)
                continue
            run += self._missed(row, key)
        self._counts["cache_seconds"] += time.monotonic() - began
        return run

    def read_hits(self, *, last: bool = False) -> Iterator[ResultBatch | list[Prompt]]:
        """Yield the answers of the hits, once there are many or these are the ``last``; and the prompts of hits whose
        answer turned out not to be there."""
        if not self._hits or not (last or len(self._hits) >= HIT_ROWS or self._tokens >= HIT_TOKENS):
            return
        hits, self._hits, self._tokens = self._hits, [], 0
        keys = [key for key, _, _ in hits]
        left = set(range(len(hits)))
        answers = self._cache.read(keys, np.array([offset for _, offset, _ in hits], np.int64))
        while True:
            began = time.monotonic()
            which, values = next(answers, (None, None))
            self._counts["cache_seconds"] += time.monotonic() - began
            if which is None or values is None:
                break
            left.difference_update(which)
            rows = np.array([hits[at][2][0].row // self._per_row for at in which], np.int64)
            yield ResultBatch(rows, _all_cached(values), measured=self._hit_counts(values))
        run = [prompt for at in sorted(left) for prompt in self._missed(hits[at][2], hits[at][0])]
        if run:
            yield run

    def store(self, outcomes: Sequence[Any], answers: Sequence[Answer], values: pa.RecordBatch | None) -> None:
        """Cache the answers of rows that have been run (n rows of ``values``). Failed rows are forgotten."""
        keys = {outcome.row: self._run.pop(outcome.row, None) for outcome in outcomes}
        new = [at for at, answer in enumerate(answers) if keys.get(answer.row) is not None and not answer.copied]
        if values is not None and new:
            chosen = values if len(new) == values.num_rows else values.take(pa.array(new))
            self._cache.add([keys[answers[at].row] or b"" for at in new], chosen)

    def finish(self) -> None:
        """Write what is left. Safe to call twice."""
        began = time.monotonic()
        self._cache.finish()
        self._counts["cache_seconds"] += time.monotonic() - began

    def measured(self) -> dict[str, float]:
        """What has been added since the last call: hits, misses, answers that were written, failures of the store, and
        seconds spent with it."""
        self._counts["cache_writes"] = self._cache.written
        self._counts["cache_failures"] = self._cache.failures
        now = dict(self._counts)
        found = {name: number - self._given.get(name, 0) for name, number in now.items()}
        self._given = now
        return found

    def _missed(self, row: list[Prompt], key: bytes | None) -> list[Prompt]:
        if key is None:
            self._counts["cache_passed"] += 1
        else:
            self._counts["cache_misses"] += 1
            self._run[row[0].row // self._per_row] = key
        return row

    def _hit_counts(self, values: pa.RecordBatch) -> dict[str, float]:
        counts: dict[str, float] = {"cache_hits": values.num_rows}
        for name in ("prompt_tokens", "completion_tokens"):
            at = values.schema.get_field_index(name)
            if at >= 0:
                counts[f"cache_hit_{name}"] = int(np.sum(values.column(at).to_numpy(zero_copy_only=False)))
        return counts

    def _key(self, row: Sequence[Prompt]) -> bytes | None:
        """The row's key; ``None`` where its answer is not to be cached."""
        parts: list[bytes] = []
        for prompt in row:
            tokens = array("i", prompt.tokens).tobytes()
            if (part := self._dedup_key(prompt, tokens)) is None:
                return None
            parts.append(part)
        return row_key(*parts)


def _all_cached(values: pa.RecordBatch) -> pa.RecordBatch:
    """The rows with all tokens of their prompts as cached ones: none was computed, as with rows that were copied."""
    at = values.schema.get_field_index("cached_tokens")
    if at < 0:
        return values
    return values.set_column(at, values.schema.field(at), values.column("prompt_tokens"))
