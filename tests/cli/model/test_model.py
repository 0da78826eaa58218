"""``rowmill model``: real exports, real quantization, and verdicts that can fail."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import helper, numpy_helper

from examples.tiny_encoder import build_classifier, build_encoder, vocabulary
from tests.cli.conftest import Rowmill
from tests.engines.onnx.support import FLOAT, graph, value


def texts(rowmill: Rowmill, rows: int = 60, seed: int = 0, name: str = "rows") -> None:
    # Texts that differ: vectors that all look alike show nothing.
    words = vocabulary()[5:80]
    chosen = random.Random(seed)
    column = [None if n == 7 else f"{n} " + " ".join(chosen.sample(words, 1 + n % 9)) for n in range(rows)]
    pq.write_table(pa.table({"text": column}), rowmill.home / f"{name}.parquet")


VALIDATE = ("rows.parquet", "--column", "text")


def test_an_export_passes_and_runs_without_the_checkpoint(rowmill: Rowmill) -> None:
    texts(rowmill)
    build_encoder(rowmill.home / "encoder", pooling="cls", normalize=True)
    done = rowmill.inside("model", "export", "encoder", "-o", "exported", "--json")
    assert done.code == 0, done.err
    assert done.document["max_difference_from_pytorch"] < 1e-3
    files = {path.name for path in (rowmill.home / "exported").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "modules.json"} <= files
    assert not any(name.endswith(".safetensors") for name in files)
    done = rowmill.inside(
        *(
            "model",
            "validate",
            "exported",
            *VALIDATE,
            "--against",
            "encoder",
            "-t",
            "embed",
            "--max-difference",
            "1e-4",
        ),
        "--json",
    )
    assert done.code == 0, done.err
    found = done.document
    assert (found["verdict"], found["rows"], found["only_one"]) == ("PASS", 59, 0)
    assert found["cosine_min"] > 0.9999 and found["agreement"] is None
    again = rowmill.inside("model", "export", "encoder", "-o", "exported")
    assert again.code == 2 and "exists" in again.err


def test_a_quantized_classifier_is_smaller_and_close(rowmill: Rowmill) -> None:
    texts(rowmill)
    build_classifier(rowmill.home / "classifier", seed=3)
    assert rowmill.inside("model", "export", "classifier", "-t", "classify", "-o", "exported").code == 0
    done = rowmill.inside("model", "quantize", "exported", "-o", "int8", "--json")
    assert done.code == 0, done.err
    kinds = {node.op_type for node in onnx.load(str(rowmill.home / "int8" / "model.onnx")).graph.node}
    assert "MatMulInteger" in kinds or "DynamicQuantizeMatMul" in kinds
    compare = ("model", "validate", "int8", *VALIDATE, "--against", "exported", "-t", "classify")
    done = rowmill.inside(*compare, "--json", "--agreement", "0.5")
    assert done.code == 0, done.err
    assert 0 < done.document["max_difference"] < 0.2
    done = rowmill.inside(*compare, "--max-difference", "1e-9")
    assert done.code == 1 and "FAIL" in done.out and "largest difference is" in done.out


def test_static_quantization_takes_its_scales_from_rows(rowmill: Rowmill) -> None:
    """Then a row's result does not depend on the rows beside it."""
    texts(rowmill)
    build_encoder(rowmill.home / "encoder")
    assert rowmill.inside("model", "export", "encoder", "-o", "exported").code == 0
    rows = ("-t", "embed", "--column", "text")
    done = rowmill.inside(
        "model", "quantize", "exported", "-o", "static", "--calibrate", "rows.parquet", *rows, "--json"
    )
    assert done.code == 0, done.err
    assert done.document["method"].startswith("static")
    kinds = {node.op_type for node in onnx.load(str(rowmill.home / "static" / "model.onnx")).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    texts(rowmill, seed=1, name="others")
    compare = ("--against", "exported", *rows, "--min-cosine", "0.9", "--mean-cosine", "0.95", "--json")
    calibrated = rowmill.inside("model", "validate", "static", "rows.parquet", *compare)
    assert calibrated.code == 1 and calibrated.document["verdict"] == "INSUFFICIENT"
    assert "calibrated the candidate" in " ".join(calibrated.document["reasons"])
    done = rowmill.inside("model", "validate", "static", "others.parquet", *compare)
    assert done.code == 0, done.out
    assert done.document["cosine_min"] < 1
    found = []
    for output, budget in (("alone", 1), ("together", 4096)):
        run = ("run", "rows.parquet", "-o", output, "-m", "static", *rows, "--set", f"token_budget={budget}")
        assert rowmill.inside(*run).code == 4
        found.append(pq.read_table(rowmill.home / output / "data")["embedding"].to_pylist())
    alone, together = (np.array([row for row in rows if row], np.float32) for rows in found)
    assert np.abs(alone - together).max() < 1e-5
    wrong = rowmill.inside("model", "quantize", "exported", "-o", "x", "--calibrate", "rows.parquet", "-t", "tensor")
    assert wrong.code == 2 and "no column" in wrong.err and not (rowmill.home / "x").exists()
    wrong = rowmill.inside("model", "quantize", "exported", "-o", "x", "--column", "text")
    assert wrong.code == 2 and "are about the rows of --calibrate" in wrong.err


def test_another_model_fails(rowmill: Rowmill) -> None:
    texts(rowmill, 20)
    build_encoder(rowmill.home / "one")
    build_encoder(rowmill.home / "two", seed=1)
    both = rowmill.inside(
        "model", "validate", "one", *VALIDATE, "--against", "one", "-t", "embed", "--prefix", "query: "
    )
    assert both.code == 0, both.err
    refused = rowmill.inside(
        "model", "validate", "one", *VALIDATE, "--against", "one", "-t", "embed", "--prompt-name", "nobody"
    )
    assert refused.code == 2 and "prompt_name" in refused.err
    done = rowmill.inside("model", "validate", "two", *VALIDATE, "--against", "one", "-t", "embed", "--json")
    assert done.code == 1
    assert done.document["verdict"] == "FAIL" and "worst cosine" in " ".join(done.document["reasons"])


def matmul(path: Path, width: int, factor: float = 1.0) -> Path:
    """A graph of one matrix product, ``y = factor * x @ w``."""
    weights = (factor * np.random.default_rng(0).normal(size=(width, width))).astype(np.float32)
    return graph(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", FLOAT, ["b", width])],
        [value("y", FLOAT, ["b", width])],
        [numpy_helper.from_array(weights, "w")],
    )


def vectors(rowmill: Rowmill, width: int, rows: int = 40) -> None:
    flat = pa.array(np.random.default_rng(1).normal(size=rows * width).astype(np.float32))
    pq.write_table(pa.table({"x": pa.FixedSizeListArray.from_arrays(flat, width)}), rowmill.home / "vectors.parquet")


def test_a_verdict_is_about_the_values_in_every_task(rowmill: Rowmill) -> None:
    vectors(rowmill, 8)
    for name, factor in (("good", 1.0), ("negated", -1.0), ("doubled", 2.0)):
        matmul(rowmill.home / f"{name}.onnx", 8, factor)
    compare = ("vectors.parquet", "--against", "good.onnx", "-t", "tensor", "--set", "row_mode=stack", "--json")
    done = rowmill.inside("model", "validate", "good.onnx", *compare)
    assert done.code == 0 and done.document["relative_difference"] == 0, done.err
    for name, cosine in (("negated", -1), ("doubled", 1)):
        done = rowmill.inside("model", "validate", f"{name}.onnx", *compare)
        assert done.code == 1 and done.document["verdict"] == "FAIL", done.err
        assert done.document["cosine_mean"] == pytest.approx(cosine)
        assert "relative difference is" in " ".join(done.document["reasons"])
    loose = ("--max-relative-difference", "9", "--max-length-change", "9")
    assert rowmill.inside("model", "validate", "doubled.onnx", *compare, *loose).code == 0


@pytest.mark.parametrize(
    ("task", "limit"), [("score", "--min-cosine"), ("classify", "--mean-cosine"), ("embed", "--agreement")]
)
def test_a_limit_on_what_a_task_has_not_is_refused(rowmill: Rowmill, task: str, limit: str) -> None:
    texts(rowmill, 3)
    done = rowmill.inside("model", "validate", "a", *VALIDATE, "--against", "b", "-t", task, limit, "0.9")
    assert done.code == 2 and f"the results of task '{task}' have none" in done.err


def test_quantizing_says_both_sizes_and_refuses_what_is_not_smaller(rowmill: Rowmill) -> None:
    before = matmul(rowmill.home / "large.onnx", 64).stat().st_size
    done = rowmill.inside("model", "quantize", "large.onnx", "-o", "small", "--json")
    assert done.code == 0, done.err
    after = (rowmill.home / "small" / "model.onnx").stat().st_size
    assert (done.document["bytes_before"], done.document["bytes"]) == (before, after) and after < before
    matmul(rowmill.home / "tiny.onnx", 2)
    x, y = value("x", FLOAT, ["b", 4]), value("y", FLOAT, ["b", 4])
    graph(rowmill.home / "none.onnx", [helper.make_node("Neg", ["x"], ["y"])], [x], [y])
    for name, says in (("tiny", "did not get smaller"), ("none", "was quantized"), ("small/model", "quantized")):
        done = rowmill.inside("model", "quantize", f"{name}.onnx", "-o", "x")
        assert done.code == 2 and says in done.err, (name, done.err)
        assert not (rowmill.home / "x").exists()


def test_calibration_reads_its_rows_with_engine_options(rowmill: Rowmill) -> None:
    vectors(rowmill, 64)
    matmul(rowmill.home / "m.onnx", 64)
    rows = ("--calibrate", "vectors.parquet", "-t", "tensor", "--set", "row_mode=stack")
    done = rowmill.inside("model", "quantize", "m.onnx", "-o", "q", *rows)
    assert done.code == 0, done.err
    wrong = rowmill.inside("model", "quantize", "m.onnx", "-o", "x", *rows[:-1], "row_mode=heap")
    assert wrong.code == 2 and "row_mode" in wrong.err
    wrong = rowmill.inside("model", "quantize", "m.onnx", "-o", "x", *rows[-2:])
    assert wrong.code == 2 and "are about the rows of --calibrate" in wrong.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("quantize", "checkpoint", "-o", "x"), "has no ONNX graph; make one with 'rowmill model export'"),
        (("export", "nowhere", "-o", "x"), "no model 'nowhere'"),
        (("quantize", "fake", "-o", "x"), "'fake' is no model on disk"),
        (("quantize", "broken", "-o", "x"), "cannot be quantized"),
        (
            ("validate", "broken", "rows.parquet", "--against", "broken", "-t", "tensor"),
            "ONNX Runtime cannot load",
        ),
    ],
    ids=["checkpoint", "nowhere", "fake", "broken", "validate"],
)
def test_mistakes_are_told_plainly(rowmill: Rowmill, arguments: tuple[str, ...], says: str) -> None:
    texts(rowmill, 3)
    (rowmill.home / "checkpoint").mkdir()
    (rowmill.home / "checkpoint" / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    (rowmill.home / "broken").mkdir()
    (rowmill.home / "broken" / "model.onnx").write_bytes(b"\x0a\x03abc" * 3)
    done = rowmill.inside("model", *arguments)
    assert done.code == 2, done.err
    assert says in done.err and "Traceback" not in done.err
    assert not (rowmill.home / "x").exists()
    assert not list(rowmill.home.glob(".x*"))
