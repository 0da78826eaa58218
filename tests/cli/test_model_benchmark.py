from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.tiny_encoder import build_encoder
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
    # Jobs read it from there: tests/engines/test_onnx_layout.py.
    assert len(list((Path(rowmill.environment["ROWMILL_CACHE_DIR"]) / "onnx-layouts").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.parquet"], "nothing.parquet"),
        (["-t", "tensor"], "task 'tensor'"),
        (["-e", "vllm"], "does generate"),
        (["--set", "autotune=false"], "nothing to measure"),
        (["--set", "lanes=0"], "lanes"),
    ],
)
def test_benchmark_refuses(rowmill: Rowmill, encoder: Path, arguments: list[str], said: str) -> None:
    done = rowmill.inside("model", "benchmark", str(encoder), *arguments)
    assert done.code == 2
    assert said in done.err and "Traceback" not in done.err
