"""Rows whose answers are kept from earlier jobs (``cache``): which may be, under which key, and how they come back."""

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
ASIDE_ROWS, ASIDE_TOKENS = 8192, 2**22
"""Rows with a cached result, and their prompts' tokens, that gather before answers are read: each row group once."""

_CACHE = ENGINE.having("cache")
SPEED = OWN_OPTIONS.keys() | {name for name, effect in _CACHE.items() if effect == "speed"}
"""Engine options that say how fast, and not what. As everywhere, the batch may decide a tie in the last bits."""


def check(spec: JobSpec) -> None:
    """Raise :class:`InvalidJob` where answers to this job cannot be kept, or would be other than one may expect."""
    if spec.cache == "off":
        return
    if spec.image_column or spec.audio_column or spec.video_column:
        raise InvalidJob("answers about images, sounds and videos are not kept; leave it off", field=FIELD)
    outside = sorted(
        name
        for name, value in spec.engine_options.items()
        if _CACHE.get(name) == "outside" or (permissions.depends_on_value(name) and permissions.risk(name, value))
    )
    if outside:
        raise InvalidJob(
            f"answers under the engine option {outside[0]!r} are not kept, since they depend on files that the model's "
            "digest does not cover; leave it off",
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
        self._identity = dedup_keys(
            pools=spec.task in pooling.TASKS,
            is_deterministic=sampled or is_deterministic(spec.sampling),
            sampled=sampled,
        )
        self._run: dict[int, bytes] = {}  # the rows that are being run → their keys
        self._aside: list[tuple[bytes, int, list[Prompt]]] = []
        self._tokens = 0
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._given: Mapping[str, float] = {}

    def partition_hits(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Of these prompts, those that have to be run now; the others have an answer, it seems."""
        began = time.monotonic()
        rows = [list(group) for _, group in groupby(prompts, lambda prompt: prompt.row // self._per_row)]
        keys = [self._key(row) for row in rows]
        asked = [key for key in keys if key is not None]
        offsets = iter(self._cache.find(asked).tolist())
        run: list[Prompt] = []
        for row, key in zip(rows, keys, strict=True):
            offset = -1 if key is None else next(offsets)
            if key is not None and offset >= 0:
                self._aside.append((key, offset, row))
                self._tokens += sum(len(prompt.tokens) for prompt in row)
                continue
            run += self._missed(row, key)
        self._counts["cache_seconds"] += time.monotonic() - began
        return run

    def read_hits(self, *, last: bool = False) -> Iterator[ResultBatch | list[Prompt]]:
        """The answers to rows that were set aside, once there are many or these are the last; and the prompts of those
        whose answer turned out not to be there."""
        if not self._aside or not (last or len(self._aside) >= ASIDE_ROWS or self._tokens >= ASIDE_TOKENS):
            return
        aside, self._aside, self._tokens = self._aside, [], 0
        keys = [key for key, _, _ in aside]
        left = set(range(len(aside)))
        answers = self._cache.read(keys, np.array([offset for _, offset, _ in aside], np.int64))
        while True:
            began = time.monotonic()
            which, values = next(answers, (None, None))
            self._counts["cache_seconds"] += time.monotonic() - began
            if which is None or values is None:
                break
            left.difference_update(which)
            rows = np.array([aside[at][2][0].row // self._per_row for at in which], np.int64)
            yield ResultBatch(rows, _unpaid(values), measured=self._hits(values))
        run = [prompt for at in sorted(left) for prompt in self._missed(aside[at][2], aside[at][0])]
        if run:
            yield run

    def store(self, outcomes: Sequence[Any], answers: Sequence[Answer], values: pa.RecordBatch | None) -> None:
        """Rows have been run: keep their answers (n rows of ``values``). Failed rows are forgotten."""
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
        """What has been added since this was asked last: rows that were run without a cached result, answers that were
        kept, failures of the store, seconds spent with it."""
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

    def _hits(self, values: pa.RecordBatch) -> dict[str, float]:
        counts: dict[str, float] = {"cache_hits": values.num_rows}
        for name in ("prompt_tokens", "completion_tokens"):
            at = values.schema.get_field_index(name)
            if at >= 0:
                counts[f"cache_hit_{name}"] = int(np.sum(values.column(at).to_numpy(zero_copy_only=False)))
        return counts

    def _key(self, row: Sequence[Prompt]) -> bytes | None:
        """The row's key; ``None`` where its answer is not to be kept."""
        parts: list[bytes] = []
        for prompt in row:
            tokens = array("i", prompt.tokens).tobytes()
            settles = self._identity(prompt, tokens)
            if settles is None:
                return None
            parts.append(settles)
        return row_key(*parts)


def _unpaid(values: pa.RecordBatch) -> pa.RecordBatch:
    """As it is with rows that were copied from another: no token of the prompt was computed for it."""
    at = values.schema.get_field_index("cached_tokens")
    if at < 0:
        return values
    return values.set_column(at, values.schema.field(at), values.column("prompt_tokens"))
