"""What Rowmill is held against in ``benchmarks.rows``: ``python rows.py NAME WORKLOAD SOURCE MODEL OUTPUT``.
``NAME --try`` says by its exit status whether the contender runs here.

Imports nothing of Rowmill. One process from start to end; ``OUTPUT`` is a folder that is there.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 65_536
Column = Any
Compute = Callable[[pa.RecordBatch], "pa.Array[Any]"]


def _graph(model: str, name: str) -> Compute:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def compute(batch: pa.RecordBatch) -> Any:
        column: Column = batch.column(name)
        rows = column.flatten().to_numpy().reshape(len(column), -1)
        (found,) = session.run(None, {name: rows})
        return pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), found.shape[1])

    return compute


def _answers(batch: pa.RecordBatch) -> Any:
    """What the fake engine answers, as a short script would write it."""
    texts = batch.column("text").to_pylist()
    return pa.array([f"fake:{hashlib.sha256(text.encode()).hexdigest()[:8]} {text[:64]}" for text in texts])


def _compute(workload: str, model: str) -> tuple[str, Compute]:
    match workload:
        case "mlp":
            return "y", _graph(model, "x")
        case "ngrams":
            return "p", _graph(model, "ngrams")
        case "fake":
            return "output", _answers
        case _:
            return "output", lambda batch: batch.column("c000")


def _kept(workload: str, names: list[str]) -> list[str]:
    return ["id"] if workload == "fake" else names


def bare(workload: str, source: str, model: str, output: Path) -> None:
    """The shortest loop that one would write; for ``wide`` a plain copy, with checksums."""
    name, compute = _compute(workload, model)
    file = pq.ParquetFile(source, page_checksum_verification=workload == "wide")
    kept = _kept(workload, file.schema_arrow.names)
    writer = None
    for batch in file.iter_batches(BATCH):
        table = pa.table({**{column: batch.column(column) for column in kept}, name: compute(batch)})
        if writer is None:
            writer = pq.ParquetWriter(
                output / "out.parquet", table.schema, compression="zstd", write_page_checksum=workload == "wide"
            )
        writer.write_table(table)
    if writer is not None:
        writer.close()


def daft(workload: str, source: str, model: str, output: Path) -> None:
    """A batch function over the column that the model reads, of an object that holds the graph."""
    import daft
    from daft import DataType

    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    name, _ = _compute(workload, model)
    reads = {"mlp": "x", "ngrams": "ngrams", "fake": "text"}.get(workload, "c000")
    kind = {
        "mlp": DataType.fixed_size_list(DataType.float32(), 1),
        "ngrams": DataType.fixed_size_list(DataType.float32(), 8),
        "fake": DataType.string(),
    }.get(workload, DataType.float64())

    @daft.cls
    class Model:
        def __init__(self) -> None:
            _, self.compute = _compute(workload, model)

        @daft.method.batch(return_dtype=kind)
        def infer(self, column: daft.Series) -> Any:
            return self.compute(pa.RecordBatch.from_arrays([column.to_arrow()], [reads]))

    frame = daft.read_parquet(source)
    kept = _kept(workload, frame.column_names)
    frame = frame.with_column(name, Model().infer(frame[reads])).select(*kept, name)
    frame.write_parquet(str(output), compression="zstd")


def main() -> None:
    which = sys.argv[1]
    if sys.argv[2] == "--try":
        __import__(which)
        return
    workload, source, model, output = sys.argv[2:6]
    {"bare": bare, "daft": daft}[which](workload, source, model, Path(output))


if __name__ == "__main__":
    main()
