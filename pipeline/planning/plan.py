"""What planning found out and every worker needs again: kept as JSON with the job."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """``schema`` is the unified schema of the input, ``columns`` what the engine reads, ``keep`` what is copied out.

    ``converted``: the sources are Parquet chunks in the job's work folder, made from other formats. ``part_rows``: the
    shards hold rows that begin alike, and each output file has this many rows; ``None``: each shard becomes one file.
    ``adapters``: the digest of each LoRA adapter, by name. ``input_rows``: rows of the whole input, of which the job
    has some (``limit``, ``sample``). ``files``: a digest of the files that were read, before any was converted. Plans
    of older versions say neither.
    """

    schema: pa.Schema
    columns: tuple[str, ...]
    keep: tuple[str, ...]
    model_digest: str
    architectures: tuple[str, ...]
    converted: bool = False
    part_rows: int | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    input_rows: int | None = None
    files: str | None = None

    def has_adapter(self, name: str, digest: str) -> bool:
        """Whether an adapter is the one that was planned with; plans of older versions do not say."""
        return self.adapters.get(name, digest) == digest

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": base64.b64encode(self.schema.serialize().to_pybytes()).decode(),
            "columns": list(self.columns),
            "keep": list(self.keep),
            "model_digest": self.model_digest,
            "architectures": list(self.architectures),
            "converted": self.converted,
            "part_rows": self.part_rows,
            "adapters": dict(self.adapters),
            "input_rows": self.input_rows,
            "files": self.files,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlanRecord:
        return cls(
            schema=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(data["schema"]))),
            columns=tuple(data["columns"]),
            keep=tuple(data["keep"]),
            model_digest=data["model_digest"],
            architectures=tuple(data["architectures"]),
            converted=data["converted"],
            part_rows=data.get("part_rows"),
            adapters=data.get("adapters") or {},
            input_rows=data.get("input_rows"),
            files=data.get("files"),
        )
