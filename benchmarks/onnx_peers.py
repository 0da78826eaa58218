"""The peers of ``benchmarks.onnx``: each in a virtual environment of its own, installed when it is first asked for.

This file is also what runs in those environments, by ``python onnx_peers.py NAME MODEL GRAPH``; it imports nothing of
Rowmill then.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REQUIREMENTS = {
    "st-torch": ["sentence-transformers", "torch==2.13.0", "pyarrow"],
    "st-onnx": ["sentence-transformers[onnx]", "torch==2.13.0", "pyarrow", "onnxruntime"],
    "fastembed": ["fastembed", "pyarrow"],
    "infinity": ["infinity-emb[optimum,torch]", "torch==2.13.0", "pyarrow<18", "onnxruntime"],
}


def commands(folder: Path, float32: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The command of every peer that works here, and for the others the last line of why not."""
    found, missing = {}, {}
    for name, requirements in REQUIREMENTS.items():
        python = folder / name / "bin" / "python"
        reason = _installed(python, requirements)
        command = [str(python), "-P", __file__, name, str(float32)]  # -P: the onnx beside this file is not onnx
        reason = reason or _last_line([*command, "--try"])
        if reason:
            missing[name] = reason
        else:
            found[name] = command
    return found, missing


def _installed(python: Path, requirements: list[str]) -> str | None:
    stamp = python.parent.parent / ".requirements"
    if stamp.exists() and stamp.read_text() == json.dumps(requirements):
        return None
    uv = Path(sys.executable).with_name("uv")
    shutil.rmtree(python.parent.parent, ignore_errors=True)
    # As the Makefile does: PyTorch's CPU build out of the wheels that pip knows, else out of PyTorch's index.
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    if links:
        os.environ["UV_FIND_LINKS"] = links.replace(" ", ",")
    backend = [] if links else ["--torch-backend", "cpu"]
    for command in (
        [str(uv), "venv", "-q", "--python", sys.executable, str(python.parent.parent)],
        [str(uv), "pip", "install", "-q", *backend, "--python", str(python), *requirements],
    ):
        if reason := _last_line(command):
            return reason
    stamp.write_text(json.dumps(requirements))
    return None


def _last_line(command: list[str]) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return None if done.returncode == 0 else (lines or ["it ended without a word"])[-1][:200]


def load(name: str, model: str) -> Any:
    """texts → embeddings [n, 384], by the peer's own means with its own defaults, normalized."""
    if name in ("st-torch", "st-onnx"):
        from sentence_transformers import SentenceTransformer

        options = {"backend": "onnx", "model_kwargs": {"file_name": "model.onnx"}} if name == "st-onnx" else {}
        encoder = SentenceTransformer(model, device="cpu", **options)
        return lambda texts: encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    if name == "fastembed":
        import numpy as np
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
    if name == "infinity":
        import asyncio

        import numpy as np
        from infinity_emb import AsyncEmbeddingEngine, EngineArgs

        engine = AsyncEmbeddingEngine.from_args(
            EngineArgs(model_name_or_path=model, engine="torch", device="cpu", model_warmup=False)
        )
        loop = asyncio.new_event_loop()
        loop.run_until_complete(engine.astart())
        return lambda texts: np.stack(loop.run_until_complete(engine.embed(sentences=texts))[0])
    raise SystemExit(f"no peer {name}")


def main() -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, model = sys.argv[1:3]
    encode = load(name, model)
    if sys.argv[3:] == ["--try"]:
        assert np.asarray(encode(["a text"])).shape == (1, 384)
        os._exit(0)  # infinity's threads would go on for ever
    print("ready", flush=True)
    for line in sys.stdin:
        source, output = map(Path, line.rstrip("\n").split("\t"))
        output.mkdir(parents=True)
        used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        texts = pq.read_table(source, columns=["text"]).column("text").to_pylist()
        found = np.ascontiguousarray(encode(texts), np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), found.shape[1])
        pq.write_table(pa.table({"embedding": column}), output / "embeddings.parquet")
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        print(json.dumps({"seconds": seconds, "cpu": cpu, "facts": {}}), flush=True)


if __name__ == "__main__":
    main()
