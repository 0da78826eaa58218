"""sentence-transformers folders: whatever modules they have, the vectors are those of ``encode()``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st

from examples.tiny_encoder import MAX_LENGTH, WIDTH, build_encoder
from pipeline.engines.model_config import sentence_layers, sentence_modules, text
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.models import derived_model
from pipeline.models.export import exported
from pipeline.models.resolve import resolve
from storage.errors import InvalidJob, InvalidModel
from tests.engines.onnx.support import embeddings, engine, job, model_at, run

LIMIT = 40
# One word is one token, and two are special.
TEXTS = [" ".join((["river", "house", "cat", "night", "work"] * 200)[n : 2 * n]) for n in (1, 4, 37, 38, 39, 700)]
ALL_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its graph, exported once."""
    home = tmp_path_factory.mktemp("base")
    path = build_encoder(home / "encoder")
    made = exported(path, "encoder", "0" * 64, home / "cache", lambda message: None)
    shutil.copy(made.graph, path / "model.onnx")
    return path


def spread(module: Any, factor: float = 2.0) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3).mul_(factor)
    return module


def folder(
    path: Path, base: Path, *after: Any, pooling: Any = "mean", include_prompt: bool = True, limit: int | None = LIMIT,
    **how: Any,
) -> Path:  # fmt: skip
    parts = [st.Transformer(str(base), max_seq_length=limit), st.Pooling(WIDTH, pooling, include_prompt=include_prompt)]
    SentenceTransformer(modules=[*parts, *after], device="cpu", **how).save(str(path))
    shutil.copy(base / "model.onnx", path)
    return path


def encode(path: Path, texts: list[str] = TEXTS, **how: Any) -> np.ndarray[Any, Any]:
    model = SentenceTransformer(str(path), device="cpu")
    return np.asarray(model.encode(texts, batch_size=1, show_progress_bar=False, **how))


def vectors(path: Path, cache: Path, texts: list[str] = TEXTS, **fields: Any) -> np.ndarray[Any, Any]:
    """By the engine: in one mixed batch, and each text alone, which must be the same."""
    spec = job("embed", **fields)
    rows = pa.record_batch({"text": texts})
    OnnxEngine.check(spec, model_at(path, graphs=["model.onnx"]), rows.schema)
    made = engine(path, spec, cache, token_budget=100_000)
    try:
        together, failures = run(made, spec, rows)
        assert not failures
        alone = np.concatenate([embeddings(run(made, spec, rows.slice(n, 1))[0]) for n in range(len(texts))])
        assert np.allclose(embeddings(together), alone, rtol=1e-5, atol=1e-5)
        return embeddings(together)
    finally:
        made.close()


def same(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-6 * max(1.0, float(np.abs(expected).max()))


PROMPTS = {"query": "find the river: ", "document": "keep: "}
FOLDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (lambda: [spread(st.Dense(WIDTH, 20))], {}),
    "normalize around dense": (
        lambda: [st.Normalize(), spread(st.Dense(WIDTH, 48, bias=False)), st.Normalize()],
        {"pooling": "cls"},
    ),
    "two dense and layer norm": (
        lambda: [
            spread(st.Dense(WIDTH, 24, activation_function=torch.nn.GELU())),
            spread(st.LayerNorm(24)),
            spread(st.Dense(24, 24, activation_function=torch.nn.Identity(), use_residual=True)),
        ],
        {"pooling": "lasttoken"},
    ),
    "all poolings": (lambda: [spread(st.Dense(6 * WIDTH, 20), 0.1), st.Dropout(0.5)], {"pooling": ALL_MODES}),
    "shortened": (lambda: [st.Normalize()], {"truncate_dim": 8, "pooling": "weightedmean"}),
    "wider than the vector": (list, {"truncate_dim": 99, "pooling": "mean_sqrt_len_tokens"}),
    "prompt not pooled": (
        lambda: [st.Normalize()],
        {"prompts": PROMPTS, "default_prompt_name": "query", "include_prompt": False, "pooling": ALL_MODES},
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_vectors_are_those_of_encode(tmp_path: Path, base: Path, kind: str) -> None:
    after, how = FOLDERS[kind]
    path = folder(tmp_path / "model", base, *after(), **how)
    same(vectors(path, tmp_path), encode(path))


def test_prompts_by_name_and_by_text(tmp_path: Path, base: Path) -> None:
    for include in (True, False):
        path = folder(tmp_path / f"{include}", base, st.Normalize(), prompts=PROMPTS, include_prompt=include)
        same(vectors(path, tmp_path, prompt_name="document"), encode(path, prompt_name="document"))
        same(vectors(path, tmp_path, prefix="see: "), encode(path, prompt="see: "))
        same(vectors(path, tmp_path), encode(path))
    with pytest.raises(InvalidJob, match="no prompt 'passage'; it has document, query"):
        vectors(path, tmp_path, prompt_name="passage")
    with pytest.raises(InvalidJob, match="only the first piece of a text"):
        vectors(path, tmp_path, prompt_name="query", overlong="split")


def test_a_text_shorter_than_its_prompt_after_cutting(tmp_path: Path, base: Path) -> None:
    """Nothing is left to pool: zeros, as encode() gives."""
    prompt = "one two three four five six "
    how = {"prompts": {"query": prompt}, "default_prompt_name": "query", "include_prompt": False, "limit": 6}
    path = folder(tmp_path / "model", base, **how, pooling=("mean", "lasttoken", "cls"))
    found = vectors(path, tmp_path)
    same(found, encode(path))


def test_normalize_and_dimensions_of_the_job_go_before_the_folders(tmp_path: Path, base: Path) -> None:
    path = folder(tmp_path / "model", base, spread(st.Dense(WIDTH, 20)), st.Normalize(), truncate_dim=8)
    same(vectors(path, tmp_path, normalize=True), encode(path, normalize_embeddings=True))
    same(
        vectors(path, tmp_path, dimensions=12, normalize=True), encode(path, truncate_dim=12, normalize_embeddings=True)
    )
    plain = vectors(path, tmp_path, normalize=False)
    assert plain.shape[1] == 8
    cosine = (plain * encode(path)).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(encode(path), axis=1)
    assert np.allclose(cosine, 1, atol=1e-6) and np.abs(np.linalg.norm(plain, axis=1) - 1).min() > 0.01
    with pytest.raises(InvalidJob, match="int8 needs embeddings of unit length"):
        vectors(path, tmp_path, embedding_type="int8")


@pytest.mark.parametrize(("tokenizer", "own", "limit"), [(16, 40, 40), (40, 16, 16), (30, None, 30), (99, 99, 64)])
def test_the_folders_limit_goes_before_the_tokenizers(
    tmp_path: Path, base: Path, tokenizer: int, own: int | None, limit: int
) -> None:
    """None has more tokens than the model has positions."""
    path = folder(tmp_path / "model", base)
    for name, field, size in (
        ("tokenizer_config.json", "model_max_length", tokenizer),
        ("sentence_bert_config.json", "max_seq_length", own),
    ):
        file = path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: size}))
    assert text.read(model_at(path)).max_length == limit <= MAX_LENGTH
    if limit < MAX_LENGTH:
        same(vectors(path, tmp_path), encode(path))


def test_every_activation_is_pytorchs(tmp_path: Path) -> None:
    x = np.concatenate([np.linspace(-30, 30, 61), [0.0, 1e-4, -1e-4]]).astype(np.float32).reshape(-1, 4)
    eye = torch.nn.Linear(4, 4)
    with torch.no_grad():
        eye.weight.copy_(torch.eye(4))
        eye.bias.zero_()
    save_file({"linear.weight": eye.weight, "linear.bias": eye.bias}, tmp_path / "model.safetensors")
    for name in sentence_layers._ACTIVATIONS:
        named = f"torch.nn.{name}"
        layer = sentence_layers.Dense(
            tmp_path, 4, 4, True, sentence_layers.activation_name(named, tmp_path), residual=False
        )
        expected = getattr(torch.nn, name)()(torch.from_numpy(x)).numpy()
        assert np.allclose(sentence_layers.load([layer])(x), expected, rtol=2e-6, atol=1e-6), name


def test_weights_of_16_bits_are_read(tmp_path: Path) -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    for dtype in (torch.float16, torch.bfloat16):
        save_file({"linear.weight": weight.to(dtype)}, tmp_path / "model.safetensors")
        layer = sentence_layers.Dense(tmp_path, 4, 3, False, "Identity", residual=False)
        expected = x @ weight.to(dtype).float().numpy().T
        assert np.allclose(sentence_layers.load([layer])(x), expected, rtol=1e-6)


MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]
DENSE = {"in_features": 4, "out_features": 3, "bias": False, "activation_function": "torch.nn.modules.activation.Tanh"}


def written(root: Path, modules: Any, dense: dict[str, Any], pooling: dict[str, Any] | None = None) -> Path:
    (root / "2_Dense").mkdir()
    (root / "1_Pooling").mkdir()
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {}))
    (root / "2_Dense" / "config.json").write_text(json.dumps(dense))
    save_file({"linear.weight": torch.zeros(3, 4)}, root / "2_Dense" / "model.safetensors")
    return root


@pytest.mark.parametrize(
    ("modules", "dense", "pooling", "says"),
    [
        ([*MODULES[:2], MODULES[2] | {"type": "sentence_transformers.models.Asym"}], DENSE, {}, "a module Asym"),
        (
            [*MODULES[:2], MODULES[2] | {"type": "sentence_transformers.base.modules.router.Router"}],
            DENSE,
            {},
            "Router",
        ),
        ([*MODULES[:2], MODULES[2] | {"type": "my_code.Dense"}], DENSE, {}, "a module my_code.Dense"),
        ([MODULES[0], MODULES[2] | {"idx": 1}, MODULES[1] | {"idx": 2}], DENSE, {}, "Dense before Pooling"),
        ([*MODULES, MODULES[1] | {"idx": 3}], DENSE, {}, "Pooling in place 4"),
        (MODULES, DENSE | {"activation_function": "my_code.Tanh"}, {}, "the activation my_code.Tanh"),
        (MODULES, DENSE | {"activation_function": "torch.nn.Softmax"}, {}, "the activation torch.nn.Softmax"),
        (MODULES, DENSE | {"activation_function": "os.system"}, {}, "the activation os.system"),
        (MODULES, DENSE | {"module_input_name": "token_embeddings"}, {}, "turns token_embeddings into"),
        (MODULES, DENSE | {"in_features": 5}, {}, r"has shape \[3, 4\]; the module's config.json asks for \[3, 5\]"),
        (MODULES, DENSE | {"bias": True}, {}, "linear.bias is missing"),
        (MODULES, DENSE | {"out_features": 0}, {}, "says nothing of out_features, or no number above 0"),
        (MODULES, DENSE, {"embedding_dimension": 4, "pooling_mode": ["cls", "max"]}, "takes 4 numbers, and gets 8"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    tmp_path: Path, modules: Any, dense: dict[str, Any], pooling: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidModel, match=says):
        sentence_modules.read(written(tmp_path, modules, dense, pooling))


def test_pickled_damaged_and_missing_weights_are_refused(tmp_path: Path) -> None:
    root = written(tmp_path, MODULES, DENSE)
    assert sentence_modules.read(root) is not None
    weights = root / "2_Dense" / "model.safetensors"
    for content in (b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", weights.read_bytes()[:20]):
        weights.write_bytes(content)
        with pytest.raises(InvalidModel, match="is not a safetensors file"):
            sentence_modules.read(root)
    weights.rename(root / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(InvalidModel, match="a pickle, which can run code"):
        sentence_modules.read(root)
    (root / "2_Dense" / "pytorch_model.bin").unlink()
    with pytest.raises(InvalidModel, match="has no weights"):
        sentence_modules.read(root)


def test_a_copy_keeps_the_layers_and_the_digest_counts_them(tmp_path: Path, base: Path) -> None:
    path = folder(tmp_path / "model", base, spread(st.Dense(WIDTH, 20)))
    with derived_model.new_directory(tmp_path / "copy") as work:
        derived_model.copy_files(resolve(str(path), tmp_path), work)
        shutil.copy(path / "model.onnx", work)
    assert not (tmp_path / "copy" / "model.safetensors").exists()
    same(vectors(tmp_path / "copy", tmp_path), encode(path))
    assert resolve(str(tmp_path / "copy"), tmp_path).weights == ()
    for name in (tmp_path / "copy", tmp_path / "copy" / "model.onnx"):
        before = resolve(str(name), tmp_path).digest
        spread(layer := st.Dense(WIDTH, 20), 3.0)
        layer.save(str(tmp_path / "copy" / "2_Dense"))
        assert resolve(str(name), tmp_path).digest != before
        spread(layer, 1.5).save(str(tmp_path / "copy" / "2_Dense"))


def test_a_pooled_graph_beside_layers_is_refused_unless_it_is_the_whole_model(tmp_path: Path, base: Path) -> None:
    import onnx

    path = folder(tmp_path / "model", base, spread(st.Dense(WIDTH, 20)))
    for name, says in (("pooled", "is pooled already"), ("sentence_embedding", "they are not in the graph")):
        graph = onnx.load(base / "model.onnx")
        states = graph.graph.output[0].name
        graph.graph.node.append(onnx.helper.make_node("ReduceMax", [states], ["most"], keepdims=0, axes=None))
        axis = onnx.numpy_helper.from_array(np.array([1], np.int64), "axis")
        graph.graph.initializer.append(axis)
        graph.graph.node[-1].CopyFrom(onnx.helper.make_node("ReduceMax", [states, "axis"], [name], keepdims=0))
        del graph.graph.output[:]
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", WIDTH]))
        onnx.save(graph, path / "model.onnx")
        with pytest.raises(InvalidModel, match=says):
            vectors(path, tmp_path / name)
