"""A thousand rows, fifty of them bad in ten ways: 950 results, and each bad row with the code that it always has."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import TensorProto, helper

from examples.tiny_vision import LABELS, build_vit
from tests.cli.conftest import Rowmill
from tests.engines.onnx.support import FLOAT, INT64, graph, value

ROWS, BAD = 1000, 50
VOCABULARY, WIDTH = 40, 3
Row = dict[str, Any]
Spoil = Callable[[Row], None]


def spoilt(rows: list[Row], ways: dict[str, tuple[str, Spoil]]) -> dict[int, tuple[str, str]]:
    """Spoil fifty of the rows, each way five times. Row → the way, and the code that it must have."""
    assert len(ways) == 10
    chosen = random.Random(7).sample(range(ROWS), BAD)
    made = {}
    for at, row in enumerate(chosen):
        name = list(ways)[at % 10]
        code, spoil = ways[name]
        spoil(rows[row])
        made[row] = (name, code)
    return made


def codes_of(table: pa.Table) -> dict[int, str]:
    return {row: error["code"] for row, error in enumerate(table["error"].to_pylist()) if error}


def sets(**values: Any) -> Spoil:
    return lambda row: row.update(values)


def tensor_graph(path: Path) -> Path:
    """ids [N, L], weights [N, L, 3], half [N] (bfloat16), pick [N] → pooled [N, 3].

    pooled = sum over L of table[ids] · weights, scaled by half, plus small[pick + 0].
    """
    table = np.random.default_rng(0).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    small = np.arange(4 * WIDTH, dtype=np.float32).reshape(4, WIDTH)
    return graph(
        path,
        [
            helper.make_node("Gather", ["table", "ids"], ["states"]),
            helper.make_node("Mul", ["states", "weights"], ["weighted"]),
            helper.make_node("ReduceSum", ["weighted", "one"], ["sum"], keepdims=0),
            helper.make_node("Cast", ["half"], ["scale"], to=FLOAT),
            helper.make_node("Unsqueeze", ["scale", "one"], ["column"]),
            helper.make_node("Mul", ["sum", "column"], ["scaled"]),
            helper.make_node("Add", ["pick", "zero"], ["picked"]),
            helper.make_node("Gather", ["small", "picked"], ["more"]),
            helper.make_node("Add", ["scaled", "more"], ["pooled"]),
        ],
        [
            value("ids", INT64, ["N", "L"]),
            value("weights", FLOAT, ["N", "L", WIDTH]),
            value("half", TensorProto.BFLOAT16, ["N"]),
            value("pick", INT64, ["N"]),
        ],
        [value("pooled", FLOAT, ["N", WIDTH])],
        [
            helper.make_tensor("table", FLOAT, table.shape, table.reshape(-1)),
            helper.make_tensor("small", FLOAT, small.shape, small.reshape(-1)),
            helper.make_tensor("one", INT64, [1], [1]),
            helper.make_tensor("zero", INT64, [], [0]),
        ],
    )


TENSOR_WAYS: dict[str, tuple[str, Spoil]] = {
    "null": ("missing_value", sets(ids=None)),
    "a null inside": ("missing_value", lambda row: row["ids"].__setitem__(0, None)),
    "another rank": ("wrong_shape", sets(weights={"shape": [WIDTH], "data": [1.0] * WIDTH})),
    "another size": ("wrong_shape", lambda row: row["weights"].update(shape=[len(row["ids"]) * WIDTH, 1])),
    "two lengths of one row": ("wrong_shape", lambda row: row["ids"].append(1)),
    "a shape without its data": ("invalid_value", lambda row: row["weights"]["data"].pop()),
    "NaN": ("not_finite", lambda row: row["weights"]["data"].__setitem__(0, float("nan"))),
    "a token id out of range": ("invalid_value", lambda row: row["ids"].__setitem__(0, VOCABULARY)),
    "a value that the type has not": ("invalid_value", sets(half=1.001)),
    "what only the graph knows": ("engine_refused", sets(pick=4)),
}


def test_a_thousand_tensors_of_which_fifty_are_bad(rowmill: Rowmill) -> None:
    generator = np.random.default_rng(1)
    rows: list[Row] = []
    for row in range(ROWS):
        length = int(generator.integers(1, 6))
        weights = generator.normal(size=(length, WIDTH)).astype(np.float32)
        rows.append(
            {
                "id": row,
                "ids": generator.integers(0, VOCABULARY, length).tolist(),
                "weights": {"shape": [length, WIDTH], "data": weights.reshape(-1).tolist()},
                "half": float(generator.integers(-8, 8)) / 4,
                "pick": int(generator.integers(-4, 4)),
            }
        )
    bad = spoilt(rows, TENSOR_WAYS)
    shaped = pa.struct([pa.field("shape", pa.list_(pa.int32())), pa.field("data", pa.list_(pa.float32()))])
    schema = pa.schema(
        [
            pa.field("id", pa.int64()),
            pa.field("ids", pa.list_(pa.int32())),
            pa.field("weights", shaped),
            pa.field("half", pa.float32()),
            pa.field("pick", pa.int8()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), rowmill.home / "rows.parquet", row_group_size=170)
    path = tensor_graph(rowmill.home / "pool.onnx")
    done = rowmill(
        *("run", "rows.parquet", "-o", "out", "-m", "pool.onnx", "-t", "tensor", "--set", "finite=true"),
        *("--shard-rows", "400"),
    )
    assert done.code == 4, done.err
    table = pq.read_table(rowmill.home / "out" / "data")
    assert table["id"].to_pylist() == list(range(ROWS))
    assert codes_of(table) == {row: code for row, (_, code) in bad.items()}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for row, pooled in zip(rows, table["pooled"].to_pylist(), strict=True):
        if row["id"] in bad:
            assert pooled is None
            continue
        binding = session.io_binding()
        weights = np.array(row["weights"]["data"], np.float32).reshape(1, -1, WIDTH)
        binding.bind_cpu_input("ids", np.array([row["ids"]], np.int64))
        binding.bind_cpu_input("weights", weights)
        binding.bind_cpu_input("pick", np.array([row["pick"]], np.int64))
        bits = (np.array([row["half"]], np.float32).view(np.uint32) >> 16).astype(np.uint16)
        binding.bind_input("half", "cpu", 0, TensorProto.BFLOAT16, [1], bits.ctypes.data)
        binding.bind_output("pooled")
        session.run_with_iobinding(binding)
        assert np.allclose(np.asarray(pooled), binding.get_outputs()[0].numpy()[0], rtol=1e-6, atol=1e-6)


def picture(row: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(row).integers(0, 256, (20 + row % 17, 20 + row % 13, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def enormous() -> bytes:
    """Some bytes of a PNG that claims 30,000 × 30,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


IMAGE_WAYS: dict[str, tuple[str, Spoil]] = {
    "null": ("missing_value", sets(image=None)),
    "neither bytes nor path": ("missing_value", sets(image={"bytes": None, "path": None})),
    "no bytes": ("invalid_image", sets(image={"bytes": b"", "path": None})),
    "no image": ("invalid_image", sets(image={"bytes": b"<html>not found</html>", "path": None})),
    "a truncated PNG": ("invalid_image", sets(image={"bytes": picture(0)[:-200], "path": None})),
    "a truncated JPEG": ("invalid_image", sets(image={"bytes": picture(0, "JPEG")[:-200], "path": None})),
    "an enormous image": ("invalid_image", sets(image={"bytes": enormous(), "path": None})),
    "a file that is not there": ("unreadable_uri", sets(image={"bytes": None, "path": "images/none.png"})),
    "a file that is not allowed": ("unreadable_uri", sets(image={"bytes": None, "path": "/etc/hostname"})),
    "a web address": ("unreadable_uri", sets(image={"bytes": None, "path": "http://127.0.0.1/x.png"})),
}


def test_a_thousand_images_of_which_fifty_are_bad(rowmill: Rowmill) -> None:
    rows: list[Row] = [{"id": row, "image": {"bytes": picture(row), "path": None}} for row in range(ROWS)]
    (rowmill.home / "images").mkdir()
    for row in range(0, ROWS, 50):
        (rowmill.home / "images" / f"{row}.png").write_bytes(rows[row]["image"]["bytes"])
        rows[row]["image"] = {"bytes": None, "path": f"images/{row}.png"}
    bad = spoilt(rows, IMAGE_WAYS)
    kind = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("image", kind)])
    pq.write_table(pa.Table.from_pylist(rows, schema), rowmill.home / "rows.parquet")
    vit = build_vit(rowmill.home / "vit")
    done = rowmill(
        *("run", "rows.parquet", "-o", "out", "-m", "vit", "-t", "classify", "--column", "image"),
        ROWMILL_URI_PREFIXES=f'["{rowmill.home / "images"}"]',
    )
    assert done.code == 4, done.err
    table = pq.read_table(rowmill.home / "out" / "data")
    assert table["id"].to_pylist() == list(range(ROWS))
    assert codes_of(table) == {row: code for row, (_, code) in bad.items()}
    scores = table["scores"].to_pylist()
    one_thread = onnxruntime.SessionOptions()
    one_thread.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(os.fspath(vit / "model.onnx"), one_thread)
    for row in range(ROWS):
        if row in bad:
            assert scores[row] is None
            continue
        image = PIL.Image.open(io.BytesIO(picture(row))).resize((32, 32), PIL.Image.Resampling.BILINEAR)
        pixels = (np.asarray(image, np.float32) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        (logits,) = session.run(None, {"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)})
        expected = np.exp(logits[0]) / np.exp(logits[0]).sum()
        found = {pair["label"]: pair["score"] for pair in scores[row]}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert np.allclose([found[label] for label in LABELS], expected, atol=1e-5)
