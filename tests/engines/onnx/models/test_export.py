from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from onnx import helper

from examples.tiny_encoder import build_classifier, build_encoder
from pipeline.engines.base import EngineContext
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.engines.onnx.models.text_model import TextModel
from pipeline.engines.onnx.runtime import ort
from pipeline.models import export
from storage.errors import EngineMissing, InvalidModel
from tests.engines.onnx.support import FLOAT, INT64, graph, job, model_at, model_of, value

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("encoder") / "tiny-encoder")


def test_the_export_is_told_checked_recorded_and_used_again(encoder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = export.exported(encoder, "encoder", DIGEST, tmp_path, said.append)
    assert len(said) == 1 and said[0].startswith("exporting tiny-encoder to ONNX (once; cached at ")
    assert first.exporter == "torchscript" and not first.from_cache
    assert first.max_abs_diff < export.TOLERANCE
    report = json.loads((first.graph.parent / export.REPORT).read_text())
    assert report["versions"]["torch"] and report["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    written = first.graph.stat().st_mtime_ns
    second = export.exported(encoder, "encoder", DIGEST, tmp_path, said.append)
    assert second.from_cache and second.graph == first.graph
    assert second.graph.stat().st_mtime_ns == written and len(said) == 1
    other = export.exported(encoder, "encoder", "f" * 64, tmp_path, said.append)
    assert other.graph != first.graph and len(said) == 2


def test_of_an_encoder_decoder_the_encoder_is_exported(tmp_path: Path) -> None:
    """A whole T5 and its encoder alone give the encoder's token states, whatever the length."""
    config = transformers.T5Config(
        vocab_size=99, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    whole = transformers.T5Model(config).eval()
    encoder = transformers.T5EncoderModel(config).eval()
    encoder.load_state_dict(whole.state_dict(), strict=False)
    for name, model in (("whole", whole), ("encoder", encoder)):
        model.save_pretrained(tmp_path / name)
        made = export.exported(tmp_path / name, "encoder", DIGEST, tmp_path / f"{name}-cache", lambda message: None)
        session = onnxruntime.InferenceSession(str(made.graph))
        for length in (1, 2, 8, 63, 200):
            ids = np.arange(1, length + 1)[None] % 98 + 1
            with torch.no_grad():
                expected = encoder(torch.from_numpy(ids)).last_hidden_state.numpy()
            (found,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
            assert np.abs(found - expected).max() < 1e-5


def test_the_engine_finds_the_export_of_an_earlier_one(encoder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for expected in (False, True):
        made = OnnxEngine(model_at(encoder), job("embed").task, {}, EngineContext(tmp_path, said.append))
        made.load()
        assert made.stats()["export"]["from_cache"] is expected
        made.close()
    assert len(said) == 1


def test_two_processes_that_export_at_once_end_with_one_entry(encoder: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from pipeline.models.export import exported
made = exported(Path({str(encoder)!r}), "encoder", {DIGEST!r}, Path({str(tmp_path)!r}), print)
print(made.graph, made.from_cache)
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    ends = [out.splitlines()[-1] for out, _ in outputs]
    assert ends[0].split()[0] == ends[1].split()[0]
    assert sorted(end.split()[1] for end in ends) == ["False", "True"]
    assert [path.name for path in (tmp_path / "onnx").iterdir() if path.is_dir()] == [
        Path(ends[0].split()[0]).parent.name
    ]


def test_what_a_killed_export_left_is_cleaned_up(encoder: Path, tmp_path: Path) -> None:
    first = export.exported(encoder, "encoder", DIGEST, tmp_path, lambda message: None)
    entry = first.graph.parent
    (entry / export.REPORT).unlink()  # as if deleted half way
    left = tmp_path / "onnx" / f".{entry.name}.abc.tmp"
    left.mkdir()
    again = export.exported(encoder, "encoder", DIGEST, tmp_path, lambda message: None)
    assert not again.from_cache and again.graph == first.graph
    assert not left.exists()


def test_the_other_exporter_is_used_when_the_first_one_is_wrong(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = export._trace

    def wrong(wrapped: object, inputs: tuple[str, ...], output: str, path: Path, exporter: str) -> None:
        if exporter == "dynamo":
            trace(wrapped, inputs, output, path, exporter)
            return
        constant = helper.make_tensor("c", FLOAT, [32], np.zeros(32, np.float32))
        nodes = [
            helper.make_node("Shape", ["input_ids"], ["shape"]),
            helper.make_node("Concat", ["shape", "width"], ["full"], axis=0),
            helper.make_node("Expand", ["c", "full"], [output]),
        ]
        dims = ["batch", "sequence"]
        graph(
            path,
            nodes,
            [value(name, INT64, dims) for name in inputs],
            [value(output, FLOAT, [*dims, 32])],
            [constant, helper.make_tensor("width", INT64, [1], [32])],
        )

    monkeypatch.setattr(export, "_trace", wrong)
    made = export.exported(encoder, "encoder", DIGEST, tmp_path, lambda message: None)
    assert made.exporter == "dynamo" and made.max_abs_diff < export.TOLERANCE
    notes = json.loads((made.graph.parent / export.REPORT).read_text())["notes"]
    assert len(notes) == 1 and notes[0].startswith("torchscript: differs from PyTorch by ")


def test_an_export_that_disagrees_with_pytorch_is_refused(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(InvalidModel, match=r"cannot be exported to ONNX: torchscript: differs .*; dynamo: differs"):
        export.exported(encoder, "encoder", DIGEST, tmp_path, lambda message: None)
    assert not [path for path in (tmp_path / "onnx").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 4098}, 1100),
        ({"max_position_embeddings": 66}, 64),
        ({"n_positions": 64}, 62),
        ({"max_position_embeddings": -1}, 1100),  # XLNet's: no limit
        ({}, 1100),
    ],
)
def test_a_graph_is_compared_with_pytorch_up_to_what_the_model_takes(config: dict[str, int], longest: int) -> None:
    model = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(vocab_size=9, pad_token_id=0, **config)))
    shapes = [tuple(sample["input_ids"].shape) for sample in export._samples(model)]
    lengths = [length for _, length in shapes]
    assert max(lengths) == longest and min(lengths) == 1 and len(set(shapes)) == len(shapes)
    assert any(not sample["attention_mask"].all() for sample in export._samples(model))


def test_what_is_said_to_have_no_graph_has_none(tmp_path: Path) -> None:
    """Fails once PyTorch can export it: then its line in ``WITHOUT_GRAPH`` goes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LongformerConfig(vocab_size=99, max_position_embeddings=66, attention_window=[16], **sizes)
    transformers.LongformerModel(config).save_pretrained(tmp_path / "longformer")
    (tmp_path / "work").mkdir()
    with pytest.raises(InvalidModel, match=r"cannot be exported to ONNX: torchscript: .*; dynamo: "):
        export._export(tmp_path / "longformer", "encoder", tmp_path / "work", {}, convert_tokenizer=False)


def test_a_checkpoint_without_its_head_is_refused(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"lacks weights of BertForSequenceClassification: classifier"):
        export.exported(encoder, "classifier", DIGEST, tmp_path, lambda message: None)


def test_a_damaged_checkpoint_is_refused(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_bytes((encoder / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InvalidModel, match="cannot be loaded by Transformers"):
        export.exported(folder, "encoder", DIGEST, tmp_path, lambda message: None)


def test_a_tokenizer_is_converted_when_there_is_only_a_vocabulary(tmp_path: Path) -> None:
    path = build_classifier(tmp_path / "old")
    tokens = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    (path / "vocab.txt").write_text("\n".join(sorted(tokens, key=tokens.__getitem__)))
    (path / "tokenizer.json").unlink()
    made = OnnxEngine(model_at(path), job("classify").task, {}, EngineContext(tmp_path / "cache"))
    made.load()
    model = model_of(made, TextModel)
    encoded = model.tokenizer.encode([("the red",)], truncate=True)
    made.close()
    assert encoded.ids.tolist() == [tokens[token] for token in ("[CLS]", "the", "red", "[SEP]")]


def test_without_torch_the_user_is_told_what_to_install(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = export.exported(encoder, "encoder", DIGEST, tmp_path, lambda message: None)
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    with pytest.raises(EngineMissing, match=r"needs torch: install rowmill\[export\]"):
        export.exported(encoder, "encoder", "e" * 64, tmp_path, lambda message: None)
    assert export.exported(encoder, "encoder", DIGEST, tmp_path, lambda message: None).graph == first.graph
    monkeypatch.setattr(export, "LAYOUT", export.LAYOUT + 1)  # that one was never compared as graphs are now
    with pytest.raises(EngineMissing, match="needs torch"):
        export.exported(encoder, "encoder", DIGEST, tmp_path, lambda message: None)


def test_onnxruntime_missing_or_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "installed", tuple)
    with pytest.raises(EngineMissing, match=r"not installed; install rowmill\[onnx\]"):
        ort.import_runtime()
    monkeypatch.setattr(ort, "installed", lambda: ("onnxruntime 1.31.0", "onnxruntime-gpu 1.31.0"))
    with pytest.raises(EngineMissing, match="are both installed"):
        ort.import_runtime()


def test_telemetry_is_off_in_a_fresh_process() -> None:
    code = """
import os
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
from pipeline.engines.onnx.runtime.ort import import_runtime
import_runtime()
print(os.environ["ORT_DISABLE_TELEMETRY"])
del os.environ["ORT_DISABLE_TELEMETRY"]
try:
    import_runtime()
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "EngineMissing"]
