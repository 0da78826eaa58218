"""Jobs of task ``tensor`` as a whole: what the columns settle, and which types the output has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import helper

from pipeline import Client
from pipeline.config.settings import Settings
from tests.engines.onnx.support import FLOAT, graph, value


def test_rows_of_a_graph_that_leaves_open_what_a_row_is(tmp_path: Path) -> None:
    path = graph(
        tmp_path / "m.onnx",
        [helper.make_node("Abs", ["x"], ["y"])],
        [value("x", FLOAT, ["batch", 2])],
        [value("y", FLOAT, ["items", 2])],
    )
    items, whole = [[-1.0, 2.0], [3.0, -4.0]], [[[-1.0, 2.0]], [[3.0, -4.0], [5.0, 6.0]]]
    numbers = pa.list_(pa.float32(), 2)
    pq.write_table(pa.table({"x": pa.array(items, numbers)}), tmp_path / "items.parquet")
    pq.write_table(pa.table({"x": pa.array(whole, pa.list_(numbers))}), tmp_path / "whole.parquet")
    found = {}
    jobs: dict[str, dict[str, Any]] = {"items": {}, "tensors": {"tensor_columns": True}, "whole": {}}
    with Client(settings=Settings(data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")) as client:
        for name, fields in jobs.items():
            source = tmp_path / f"{'items' if name == 'tensors' else name}.parquet"
            output = tmp_path / name
            status = client.run(input=str(source), output=str(output), model=str(path), task="tensor", **fields)
            assert status.state == "completed" and not status.rows_failed
            found[name] = pq.read_table(output / "data").column("y")
    assert found["items"].type == numbers and found["items"].to_pylist() == np.abs(items).tolist()
    assert found["tensors"].type == pa.fixed_shape_tensor(pa.float32(), [2])
    assert found["whole"].to_pylist() == [np.abs(row).tolist() for row in whole]
