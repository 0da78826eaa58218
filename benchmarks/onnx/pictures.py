"""Pictures for ``benchmarks.onnx``, and the loops over them that Rowmill is compared with.

Each loop reads encoded images from Parquet and writes a label, its score and the scores of all labels.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Turn = Callable[[Path, Path], dict[str, Any] | None]
"""Input file, output directory → facts worth showing."""

LABELS = tuple(f"kind {n}" for n in range(10))
BATCH = 8


def pictures(rows: int, seed: int = 0) -> list[bytes]:
    """JPEG files of 240 to 640 pixels a side: smooth fields with some noise on them, as photographs compress."""
    import PIL.Image

    random = np.random.default_rng(seed)
    found = []
    for _ in range(rows):
        width, height = (int(side) for side in random.integers(240, 641, 2))
        field = PIL.Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), 3)
        noise = random.normal(0, 6, (height, width, 1))
        pixels = np.clip(np.asarray(field) + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "JPEG", quality=85)
        found.append(file.getvalue())
    return found


def _files(source: Path) -> list[bytes]:
    return list(pq.read_table(source, columns=["image"]).column("image").to_pylist())


def _write(scores: Any, output: Path) -> None:
    best = scores.argmax(axis=1)
    columns = {
        "label": pa.array([LABELS[at] for at in best], pa.string()),
        "score": pa.array(scores[np.arange(len(scores)), best]),
        "scores": pa.FixedSizeListArray.from_arrays(pa.array(scores.reshape(-1)), scores.shape[1]),
    }
    pq.write_table(pa.table(columns), output / "labels.parquet")


def _softmax(logits: Any) -> Any:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _pixels(data: bytes, recipe: dict[str, Any]) -> Any:
    """float32 [3, h, w] as ``preprocessor_config.json`` asks for a ViT."""
    import PIL.Image

    with PIL.Image.open(io.BytesIO(data)) as image:
        size = (recipe["size"]["width"], recipe["size"]["height"])
        pixels = np.asarray(image.convert("RGB").resize(size, recipe["resample"]), np.float32)
    mean, std = (np.asarray(recipe[name], np.float32) for name in ("image_mean", "image_std"))
    scaled = pixels * np.float32(recipe["rescale_factor"] / std) - mean / std
    return scaled.transpose(2, 0, 1)


def _recipe(model: Path) -> dict[str, Any]:
    return dict(json.loads((model / "preprocessor_config.json").read_text()))


def naive(model: Path) -> Turn:
    """Batches of 8 in turn, decoded and run one after the other, ``session.run``, ONNX Runtime's own threads."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model / "model.onnx"), providers=["CPUExecutionProvider"])
    recipe = _recipe(model)

    def turn(source: Path, output: Path) -> None:
        files, parts = _files(source), []
        for start in range(0, len(files), BATCH):
            pixels = np.stack([_pixels(data, recipe) for data in files[start : start + BATCH]])
            parts.append(_softmax(session.run(None, {"pixel_values": pixels})[0]))
        _write(np.concatenate(parts), output)

    return turn


def torch(model: Path) -> Turn:
    """Transformers' pipeline ``image-classification`` on PyTorch, in batches of 8."""
    import PIL.Image
    import transformers

    made: Any = transformers.pipeline("image-classification", str(model), device="cpu")

    def turn(source: Path, output: Path) -> None:
        images = [PIL.Image.open(io.BytesIO(data)).convert("RGB") for data in _files(source)]
        scores = np.empty((len(images), len(LABELS)), np.float32)
        for at, answer in enumerate(made(images, batch_size=BATCH, top_k=len(LABELS))):
            for pair in answer:
                scores[at, LABELS.index(pair["label"])] = pair["score"]
        _write(scores, output)

    return turn


def best(model: Path) -> Turn:
    """The floor: everything in memory, and on each core a thread that decodes eight images and runs them in a session
    of its own of one thread, so that nothing waits; nothing kept when it is killed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    cores = len(os.sched_getaffinity(0))
    sessions = [
        onnxruntime.InferenceSession(str(model / "model.onnx"), options, providers=["CPUExecutionProvider"])
        for _ in range(cores)
    ]
    recipe = _recipe(model)

    def turn(source: Path, output: Path) -> None:
        files = _files(source)
        scores = np.empty((len(files), len(LABELS)), np.float32)
        waiting, lock = iter(range(0, len(files), BATCH)), threading.Lock()

        def lane(session: Any) -> None:
            while True:
                with lock:
                    start = next(waiting, None)
                if start is None:
                    return
                pixels = np.stack([_pixels(data, recipe) for data in files[start : start + BATCH]])
                scores[start : start + BATCH] = _softmax(session.run(None, {"pixel_values": pixels})[0])

        threads = [threading.Thread(target=lane, args=(session,)) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _write(scores, output)

    return turn
