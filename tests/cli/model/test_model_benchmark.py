from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.tiny_encoder import build_encoder
from pipeline.cli.model.benchmark import _SHOWN, _speeds
from tests.cli.conftest import Rowmill


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("models") / "encoder")


def test_benchmark_shows_what_jobs_will_do(rowmill: Rowmill, encoder: Path) -> None:
    pq.write_table(pa.table({"words": [f"red dog {n}" for n in range(120)]}), rowmill.home / "texts.parquet")
    done = rowmill("model", "benchmark", str(encoder), "texts.parquet", "--column", "words", "--json")
    assert done.code == 0, done.err
    trials = done.document["trials"]
    assert len(trials) >= 4 and all(trial["rows_per_second"] > 0 for trial in trials)
    assert done.document["chosen"] in [trial["layout"] for trial in trials if trial["chosen"]]
    # Jobs read it from there: tests/engines/onnx/runtime/test_layout.py.
    assert len(list((Path(rowmill.environment["ROWMILL_CACHE_DIR"]) / "onnx-layouts").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.parquet"], "nothing.parquet"),
        (["-t", "tensor"], "task 'tensor'"),
        (["-e", "vllm"], "measured with task generate"),
        (["-t", "generate"], "needs an autoregressive model"),
        (["--set", "autotune=false"], "nothing to measure"),
        (["--set", "lanes=0"], "lanes"),
    ],
)
def test_benchmark_refuses(rowmill: Rowmill, encoder: Path, arguments: list[str], said: str) -> None:
    done = rowmill.inside("model", "benchmark", str(encoder), *arguments)
    assert done.code == 2
    assert said in done.err and "Traceback" not in done.err


def test_the_table_of_a_language_model() -> None:
    names = ("what", "requests", "prompt_tokens", "tokens_per_second", "limit", "share")
    rows = [("prefill", 8, 512, 910.4, 1000.0, 0.91), ("decode", 1, 32, 12.3, None, None)]
    speeds = [dict(zip(names, row, strict=True)) for row in rows]
    settings = dict.fromkeys(_SHOWN, 1) | {"dtype": "float32"}
    found = {"speeds": speeds, "settings": settings, "startup_seconds": 11.0, "kv_cache_tokens": 4096, "device": "cpu"}
    unknown = _speeds({**found, "machine": None, "weights": None})
    known = {"machine": {"bandwidth": 2.0**34, "flops": 1e11}, "weights": {"n_bytes": 2**29}}
    shown = _speeds({**found, **known})
    assert "not known for quantized weights" in unknown
    assert "512.0 MiB of weights at 16.0 GiB/s, 100 GFLOP/s" in shown and "4,096 tokens" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["prefill", "8", "512", "910", "1,000", "91%"] in lines
    assert ["decode", "1", "32", "12"] in lines
