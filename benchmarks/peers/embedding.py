"""The peers of ``benchmarks.onnx``, each run in an environment of its own: ``python embedding.py NAME MODEL``.

Imports nothing of Rowmill. The protocol is that of ``onnx_variants.py``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from process_tree import Clock, end_tree

Encode = Callable[[list[str]], Any]
"""texts → embeddings [n, 384], normalized."""
Turn = Callable[[Path, Path], float]
"""Input file, output directory → when it began, by ``time.time``."""

MAX_TOKENS = 256
BUDGET = 512
RAY_BATCH = 1024


def _sentence_transformers(model: str, **options: Any) -> Encode:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu", **options)
    return lambda texts: encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def st_torch(model: str) -> Encode:
    return _sentence_transformers(model)


def st_onnx(model: str) -> Encode:
    return _sentence_transformers(model, backend="onnx", model_kwargs={"file_name": "model.onnx"})


def fastembed(model: str) -> Encode:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model="local/minilm",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local/minilm"),
        dim=384,
        model_file="model.onnx",
    )
    embedder = TextEmbedding("local/minilm", specific_model_path=model)
    return lambda texts: np.stack(list(embedder.embed(texts)))


def infinity(model: str) -> Encode:
    import asyncio

    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(model_name_or_path=model, engine="torch", device="cpu", model_warmup=False)
    )
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.astart())
    return lambda texts: np.stack(loop.run_until_complete(engine.embed(sentences=texts))[0])


ENCODERS = {"st-torch": st_torch, "st-onnx": st_onnx, "fastembed": fastembed, "infinity": infinity}


def _written(encode: Encode) -> Turn:
    def turn(source: Path, output: Path) -> float:
        began = time.time()
        texts = pq.read_table(source, columns=["text"]).column("text").to_pylist()
        found = np.ascontiguousarray(encode(texts), np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), found.shape[1])
        pq.write_table(pa.table({"embedding": column}), output / "embeddings.parquet")
        return began

    return turn


class Embed:
    """What ``map_batches`` calls: the session and the batches of the best bare loop, within a batch of Ray's."""

    def __init__(self, model: str) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        graph = str(Path(model) / "model.onnx")
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]
        self._tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.time()
        texts = batch.column("text").to_pylist()
        ids = [encoded.ids for encoded in self._tokenizer.encode_batch_fast(texts)]
        lengths = np.array([len(row) for row in ids])
        order, start = np.argsort(-lengths, kind="stable"), 0
        found = np.empty((len(ids), 384), np.float32)
        while start < len(order):
            rows = order[start : start + max(1, BUDGET // int(lengths[order[start]]))]
            found[rows] = self._vectors([ids[row] for row in rows])
            start += len(rows)
        column = pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), found.shape[1])
        return pa.table({"id": batch.column("id"), "embedding": column, "began": np.full(len(ids), began)})

    def _vectors(self, ids: list[list[int]]) -> Any:
        feed = {name: np.zeros((len(ids), len(ids[0])), np.int64) for name in self._names}
        mask = np.zeros((len(ids), len(ids[0])), np.float32)
        for at, row in enumerate(ids):
            feed["input_ids"][at, : len(row)] = row
            mask[at, : len(row)] = 1
        feed["attention_mask"][:] = mask
        total = np.matmul(mask[:, None, :], self._session.run(None, feed)[0])[:, 0]
        return total / np.linalg.norm(total, axis=1, keepdims=True)


def ray(model: str) -> Turn:
    """An actor for each core. They start with each dataset, so a turn begins with the first batch that one of them
    takes."""
    import ray

    cores = len(os.sched_getaffinity(0))
    # One processor more than there are: its reading is a task, too.
    ray.init(num_cpus=cores + 1, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def turn(source: Path, output: Path) -> float:
        pool = ray.data.ActorPoolStrategy(size=cores)
        dataset = ray.data.read_parquet(str(source)).map_batches(
            Embed, fn_constructor_args=(model,), batch_size=RAY_BATCH, batch_format="pyarrow", compute=pool, num_cpus=1
        )
        dataset.write_parquet(str(output))
        began = pq.read_table(output, columns=["began"]).column("began").to_numpy()
        return float(began.min())

    return turn


def loaded(name: str, model: str) -> Turn:
    return ray(model) if name == "ray" else _written(ENCODERS[name](model))


def attempt(turn: Turn) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pq.write_table(pa.table({"id": [0, 1], "text": ["a text", "another one"]}), folder / "in.parquet")
        (folder / "out").mkdir()
        turn(folder / "in.parquet", folder / "out")
        column: Any = pq.read_table(folder / "out").column("embedding").combine_chunks()
        assert len(column) == 2 and len(column.flatten()) == 2 * 384, column


def main() -> None:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1", "ORT_DISABLE_TELEMETRY": "1"}
    name, model = sys.argv[1:3]
    turn = loaded(name, model)
    if sys.argv[3:] == ["--try"]:
        attempt(turn)
        end_tree()
    clock = Clock()
    # The protocol has the output to itself; whatever else is printed goes where it can be read.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=lines, flush=True)
    for line in sys.stdin:
        source, output = map(Path, line.rstrip("\n").split("\t"))
        output.mkdir(parents=True)
        asked = time.time()
        began = turn(source, output)
        ended, cpu = time.time(), clock.since(began)
        facts = {"startup": began - asked}
        print(json.dumps({"seconds": ended - began, "cpu": cpu, "facts": facts}), file=lines, flush=True)
    end_tree()


if __name__ == "__main__":
    main()
