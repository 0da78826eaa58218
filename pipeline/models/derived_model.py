"""Another directory for a model: the files that belong to it, without its weights, and a new graph among them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.models import external_data, module_folders
from pipeline.models.model import Model
from storage.errors import InvalidJob, InvalidModel

_NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack"),
    *("*.onnx", "*.onnx.data", "*.onnx_data", "onnx", "openvino"),
    *(".*", "__pycache__"),
)
GRAPH = "model.onnx"


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that becomes it when the block ends well, and vanishes otherwise.

    Raises :class:`~storage.errors.InvalidJob` when there is something at ``target`` already.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidJob(f"{target} exists; give a directory that does not, or remove it", field="output")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        if target.exists():
            target.rmdir()
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def copy_files(model: Model, work: Path) -> None:
    """Copy configuration, tokenizer and recipe of the model into ``work``; weights and graphs stay behind."""
    assert model.path is not None
    root = model.path if model.path.is_dir() else model.path.parent
    if model.path.is_file() and root.name == "onnx" and not (root / "config.json").exists():
        root = root.parent
    if model.path.is_file() and not (root / "config.json").exists():
        return  # a bare graph among other things
    usual = shutil.ignore_patterns(*_NOT_COPIED)
    layers = {folder.resolve() for folder in module_folders.layers(root)}

    def passed_over(folder: str, names: list[str]) -> set[str]:
        # The graph holds the Transformer. What sentence-transformers applies after it keeps its weights.
        kept = {module_folders.LAYER_WEIGHTS} if Path(folder).resolve() in layers else set[str]()
        return set(usual(folder, names)) - kept

    shutil.copytree(root, work, dirs_exist_ok=True, ignore=passed_over)


def graph_of(model: Model) -> Path:
    """The graph that would be run. Raises :class:`~storage.errors.InvalidModel` when the model has none."""
    if not model.onnx_files:
        raise InvalidModel(f"{model.name} has no ONNX graph; make one with 'rowmill model export'", field="model")
    return model.onnx_files[0]


def copy_graph(graph: Path, work: Path) -> None:
    """Copy a graph to ``work/model.onnx``, with the files that hold its weights under their own names."""
    for location in external_data.locations(graph):
        (work / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(graph.parent / location, work / location)
    shutil.copy(graph, work / GRAPH)
