"""The loops that ``benchmarks.onnx`` compares, each in a process of its own that stays loaded between its turns.

Every one reads a column ``text`` from Parquet and writes embeddings to Parquet; those over pictures are in
``pictures.py``. A turn begins when the model is loaded
and warm, and ends when the output file is closed, so that start-up counts for none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.onnx import pictures

Turn = Callable[[Path, Path], dict[str, Any] | None]
"""Input file, output directory → facts worth showing."""

PICTURES = {
    "naive-pictures": pictures.naive,
    "torch-pictures": pictures.torch,
    "best-pictures": pictures.best,
}

MAX_TOKENS = 256
BUDGET = 512


def _tokenizer(model: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def _write(embeddings: Any, output: Path) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
    pq.write_table(pa.table({"embedding": column}), output / "embeddings.parquet")


def _texts(source: Path) -> list[str]:
    return list(pq.read_table(source, columns=["text"]).column("text").to_pylist())


def _pooled(states: Any, mask: Any) -> Any:
    total = np.matmul(mask[:, None, :].astype(np.float32), states)[:, 0]
    total /= np.linalg.norm(total, axis=1, keepdims=True)
    return total


def _padded(ids: list[list[int]]) -> dict[str, Any]:
    width = max(map(len, ids))
    feed = {name: np.zeros((len(ids), width), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    for at, row in enumerate(ids):
        feed["input_ids"][at, : len(row)] = row
        feed["attention_mask"][at, : len(row)] = 1
    return feed


def naive(model: Path, graph: Path) -> Turn:
    """Arrival order, batches of 32, ``session.run``, ONNX Runtime's own choice of threads."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    tokenizer = _tokenizer(model)
    wanted = {value.name for value in session.get_inputs()}

    def turn(source: Path, output: Path) -> None:
        texts, parts = _texts(source), []
        for start in range(0, len(texts), 32):
            feed = _padded([e.ids for e in tokenizer.encode_batch(texts[start : start + 32])])
            states = session.run(None, {k: v for k, v in feed.items() if k in wanted})[0]
            parts.append(_pooled(states, feed["attention_mask"]))
        _write(np.concatenate(parts), output)

    return turn


def best(model: Path, graph: Path) -> Turn:
    """The floor: everything in memory, duplicates once, sorted by length over the whole file, batches of 512 padded
    tokens, a session of one thread on each core; no pipeline, nothing kept when it is killed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    cores = len(os.sched_getaffinity(0))
    sessions = [
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"]) for _ in range(cores)
    ]
    tokenizer = _tokenizer(model)
    wanted = {value.name for value in sessions[0].get_inputs()}

    def turn(source: Path, output: Path) -> None:
        column = pq.read_table(source, columns=["text"]).column("text").combine_chunks().dictionary_encode()
        encoded = tokenizer.encode_batch_fast(column.dictionary.to_pylist())
        ids = [e.ids for e in encoded]
        lengths = np.array([len(row) for row in ids])
        order = np.argsort(-lengths, kind="stable")
        batches, start = [], 0
        while start < len(order):
            n = max(1, BUDGET // int(lengths[order[start]]))
            batches.append(order[start : start + n])
            start += n
        found = np.empty((len(ids), 384), np.float32)
        waiting = iter(batches)
        lock = threading.Lock()

        def lane(session: Any) -> None:
            while True:
                with lock:
                    batch = next(waiting, None)
                if batch is None:
                    return
                feed = _padded([ids[at] for at in batch])
                states = session.run(None, {k: v for k, v in feed.items() if k in wanted})[0]
                found[batch] = _pooled(states, feed["attention_mask"])

        threads = [threading.Thread(target=lane, args=(session,)) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _write(found[column.indices.to_numpy()], output)

    return turn


def rowmill(model: Path, options: dict[str, Any], folder: Path, task: str = "embed", column: str = "text") -> Turn:
    """A job, from its planning to its published output, in a process that has the engine loaded."""
    from pipeline import Client
    from pipeline.config.settings import Settings

    client = Client(settings=Settings(data_dir=folder / "data", cache_dir=folder.parent / "cache"))

    def turn(source: Path, output: Path) -> dict[str, Any]:
        status = client.run(
            input=str(source),
            output=str(output / "job"),
            model=str(model),
            task=task,
            column=column,
            keep_columns=[],
            engine="onnx",
            engine_options=options,
        )
        if status.state != "completed":
            sys.exit(f"the job ended as {status.state}")
        (attempt,) = client.job(status.id).attempts()
        return dict(attempt.stats or {})

    return turn


def serve(turn: Turn) -> None:
    """Turns as they are asked for on stdin, ``SOURCE<TAB>OUTPUT`` a line; a line of JSON for each on stdout."""
    print("ready", flush=True)
    for line in sys.stdin:
        source, output = map(Path, line.rstrip("\n").split("\t"))
        output.mkdir(parents=True)
        began = time.perf_counter()
        facts = turn(source, output)
        print(json.dumps({"seconds": time.perf_counter() - began, "facts": facts or {}}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["naive", "best", "rowmill", *PICTURES, "rowmill-pictures"])
    parser.add_argument("model", type=Path)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    if given.name == "rowmill":
        serve(rowmill(given.model, given.options, given.folder))
    elif given.name == "rowmill-pictures":
        serve(rowmill(given.model, given.options, given.folder, "classify", "image"))
    elif given.name in PICTURES:
        serve(PICTURES[given.name](given.model))
    else:
        serve({"naive": naive, "best": best}[given.name](given.model, given.graph))


if __name__ == "__main__":
    main()
