"""Model directories with every kind of file that counts, made without a framework."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_model(root: Path, seed: int = 0) -> Path:
    """A sentence-transformers directory with a tokenizer, weights, and a graph that keeps its weights beside it."""
    layers = ("", "models.Transformer"), ("1_Pooling", "models.Pooling")
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.{kind}"}
        for n, (path, kind) in enumerate(layers)
    ]
    contents = {
        "config.json": json.dumps({"architectures": ["BertModel"], "vocab_size": 7}),
        "modules.json": json.dumps(modules),
        "1_Pooling/config.json": json.dumps({"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}),
        "tokenizer.json": json.dumps({"version": "1.0", "model": {"vocab": {"a": 0, "b": 1}}}),
        "model.safetensors": f"weights of seed {seed}",
    }
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    weight = numpy_helper.from_array(np.arange(64, dtype=np.float32) + seed, "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [64]) for name in "xy")
    model = helper.make_model(helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight]))
    (root / "onnx").mkdir(exist_ok=True)
    path = str(root / "onnx" / "model.onnx")
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=1)
    return root
