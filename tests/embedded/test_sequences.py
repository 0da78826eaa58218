"""A state goes from row to row of a sequence: whatever is cut, fails or runs again, the answers are the same."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import helper, numpy_helper

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.engines.onnx.tensor.tensor_model import TensorModel
from storage.errors import InvalidJob
from tests.engines.onnx.support import FLOAT, graph, value

STATE: dict[str, Any] = {"state": {"h": "hn"}, "row_mode": "whole"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hn = h / 2 + x, and y = hn: what comes out tells every row that went before, and in which order."""
    return graph(
        tmp_path_factory.mktemp("model") / "m.onnx",
        [
            helper.make_node("Div", ["h", "two"], ["half"]),
            helper.make_node("Add", ["half", "x"], ["hn"]),
            helper.make_node("Identity", ["hn"], ["y"]),
        ],
        [value("x", FLOAT, ["batch", 1]), value("h", FLOAT, ["batch", 1])],
        [value("y", FLOAT, ["batch", 1]), value("hn", FLOAT, ["batch", 1])],
        [numpy_helper.from_array(np.array([2.0], np.float32), "two")],
    )


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings=settings.model_copy(update={"flush_rows": 3, "read_batch_rows": 5})) as client:
        yield client


def write(folder: Path, keys: list[Any], xs: list[float | None], files: int = 3) -> None:
    folder.mkdir()
    rows = pa.array([None if x is None else [[x]] for x in xs], pa.list_(pa.list_(pa.float32(), 1)))
    table = pa.table({"clip": keys, "x": rows})
    each = -(-len(keys) // files)
    for at in range(files):
        pq.write_table(table.slice(at * each, each), folder / f"{at}.parquet", row_group_size=4)


def expected(keys: list[Any], xs: list[float | None]) -> list[float | str]:
    """Of each row the answer, or the code of its error."""
    states: dict[Any, float | None] = {}
    found: list[float | str] = []
    for key, x in zip(keys, xs, strict=True):
        before = states.get(key, 0.0)
        if key is None or x is None:
            found.append("missing_value" if before is not None else "broken_sequence")
            if key is not None:
                states[key] = None
        elif before is None:
            found.append("broken_sequence")
        else:
            states[key] = before / 2 + x
            found.append(states[key])  # type: ignore[arg-type]
    return found


def answers(folder: Path) -> list[float | str]:
    table = pq.read_table(folder / "data")
    assert table.schema.names == ["clip", "x", "y", "error"]
    pairs = zip(table["y"].to_pylist(), table["error"].to_pylist(), strict=True)
    return [error["code"] if error else y[0][0] for y, error in pairs]


@pytest.mark.parametrize("layout", ["one after the other", "mixed", "failing"])
def test_rows_of_a_sequence_run_in_order_and_in_one_shard(
    client: Client, model: Path, tmp_path: Path, layout: str
) -> None:
    chance = random.Random(layout)
    keys: list[Any] = [f"clip {n // 5}" for n in range(60)]
    if layout != "one after the other":
        keys[10:40] = chance.sample(keys[10:40], 30)
        keys[50] = None
    xs: list[float | None] = [float(chance.randint(1, 9)) for _ in keys]
    if layout == "failing":
        xs[7] = xs[22] = None
    write(tmp_path / "in", keys, xs)
    status = client.run(
        input=str(tmp_path / "in"), output=str(tmp_path / "out"), model=str(model), task="tensor",
        sequence="clip", engine_options=STATE, shard_rows=7,
    )  # fmt: skip
    assert status.state == "completed"
    assert answers(tmp_path / "out") == expected(keys, xs)
    assert len(list((tmp_path / "out" / "data").iterdir())) > 2


def test_an_attempt_that_goes_on_begins_where_the_rows_before_ended(
    client: Client, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, xs = ["a"] * 9 + ["b"] * 3 + ["a"] * 8, [float(n % 7 + 1) for n in range(20)]
    write(tmp_path / "in", keys, list(xs))
    step, calls = TensorModel._step, []

    def breaking(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 14:
            while not client.jobs()[0].rows_done:  # until something was flushed
                time.sleep(0.01)
            raise RuntimeError("broken off")
        return step(*given)

    monkeypatch.setattr(TensorModel, "_step", breaking)
    status = client.run(
        input=str(tmp_path / "in"), output=str(tmp_path / "out"), model=str(model), task="tensor",
        sequence="clip", engine_options={**STATE, "max_batch": 2},
    )  # fmt: skip
    assert (status.state, status.rows_failed) == ("completed", 0)
    attempts = client.job(status.id).attempts()
    assert [attempt.state for attempt in attempts] == ["failed", "succeeded"]
    assert attempts[1].rows_resumed
    assert answers(tmp_path / "out") == expected(keys, list(xs))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"engine_options": STATE}, "engine_options.state"),
        ({"sequence": "clip"}, "sequence"),
        ({"sequence": "nobody", "engine_options": STATE}, "sequence"),
        ({"sequence": "x", "engine_options": STATE}, "sequence"),
        ({"sequence": "clip", "sample": 3, "engine_options": STATE}, ""),
        ({"sequence": "clip", "engine_options": {"state": {"g": "hn"}}}, "engine_options.state.g"),
        ({"sequence": "clip", "engine_options": {"state": {"h": "gn"}}}, "engine_options.state.h"),
        ({"sequence": "clip", "engine_options": {"state": {"h": "hn", "x": "y"}}}, "engine_options.state.h"),
        ({"sequence": "clip", "engine_options": {**STATE, "lanes": 2}}, "engine_options"),
        ({"sequence": "clip", "engine_options": STATE, "inputs": {"h": "clip"}}, "inputs"),
        ({"sequence": "clip", "engine_options": {"state": {"h": {"output": "hn", "shape": [1, 2]}}}}, "state.h"),
        ({"sequence": "clip", "engine": "fake"}, "sequence"),
    ],
)
def test_what_cannot_be_carried_on_is_refused(
    client: Client, model: Path, tmp_path: Path, fields: dict[str, Any], field: str
) -> None:
    write(tmp_path / "in", ["a", "a", "b"], [1.0, 2.0, 3.0], 1)
    with pytest.raises(InvalidJob) as refused:
        client.run(input=str(tmp_path / "in"), output=str(tmp_path / "out"), model=str(model), task="tensor", **fields)
    assert field in str(refused.value)
