"""Texts to embeddings and pictures to labels, Parquet to Parquet, on ONNX Runtime: Rowmill, the loop it has to keep up
with, and its peers.

The variants sit loaded in processes of their own and take turns on the same file, round after round, so that a busy
machine slows all of them. Ratios are taken within a round; what is shown is their median and range over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.environments import Peer, working
from benchmarks.onnx.models import graphs, minilm
from benchmarks.onnx.pictures import LABELS, pictures
from benchmarks.onnx.turns import Variant, measure, ratios, start
from examples.tiny_vision import build_vit

TARGETS = {
    ("rowmill", "best"): 0.95,
    ("rowmill", "naive"): 3.5,
    ("rowmill", "st-torch"): 2.0,
    ("rowmill", "st-onnx"): 1.4,
    ("rowmill-int8", "rowmill"): 1.7,
    ("rowmill-pictures", "best-pictures"): 0.95,
    ("rowmill-pictures", "naive-pictures"): None,
    ("rowmill-pictures", "torch-pictures"): None,
    ("rowmill", "fastembed"): None,
    ("rowmill", "infinity"): None,
    ("rowmill", "ray"): None,
}
"""Least ratio of rows per second, wanted on a quiet machine; ``None``: only shown."""

ONNX = ("onnxruntime", "tokenizers", "pyarrow", "psutil", "numpy")
TORCH = "torch==2.13.0"
PEERS = {
    "st-torch": Peer(("sentence-transformers", TORCH, "pyarrow", "psutil")),
    "st-onnx": Peer(("sentence-transformers[onnx]", TORCH, *ONNX)),
    "fastembed": Peer(("fastembed", *ONNX)),
    "infinity": Peer(("infinity-emb[optimum,torch]", TORCH, "pyarrow<18", "psutil", "onnxruntime")),
    "ray": Peer(("ray[data]==2.60.0", *ONNX)),
}


def corpus(rows: int, model: Path, seed: int = 0) -> list[str]:
    """Texts of real words, whose number is log-normal (median 17, sigma 0.9, at most 300); a tenth are repeats."""
    random = np.random.default_rng(seed)
    lines = (model / "vocab.txt").read_text(encoding="utf-8").splitlines()
    words = np.array([word for word in lines if word.isalpha() and word.isascii() and len(word) > 2])
    sizes = np.clip(random.lognormal(np.log(17), 0.9, rows), 1, 300).astype(int)
    texts = [" ".join(random.choice(words, size)) for size in sizes]
    for at in random.choice(np.arange(1, rows), rows // 10, replace=False):
        texts[at] = texts[random.integers(at)]
    return texts


def ours(name: str, folder: Path, model: Path, graph: Path, options: dict[str, Any]) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.onnx.variants", name, str(model), str(graph)]
    return [*command, "--folder", str(folder / "rowmill"), "--options", json.dumps(options)]


def table(output: Path) -> pa.Table:
    """What a turn wrote, in the order of its input."""
    found = pq.read_table(sorted(output.glob("**/*.parquet")))
    return found.sort_by("id") if "id" in found.column_names else found


def embeddings(output: Path) -> Any:
    column: Any = table(output).column("embedding").combine_chunks()
    return np.asarray(column.flatten(), dtype=np.float32).reshape(len(column), -1)


def drift(output: Path, reference: Path) -> dict[str, float]:
    """Cosines of the embeddings to those of another variant."""
    found, expected = embeddings(output), embeddings(reference)
    cosine = (expected * found).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    return {"cosine mean": float(cosine.mean()), "cosine min": float(cosine.min())}


def label_drift(output: Path, reference: Path) -> dict[str, float]:
    """How labels and their scores differ from those of another variant."""
    found, expected = table(output), table(reference)
    same = np.array(found.column("label").to_pylist()) == np.array(expected.column("label").to_pylist())
    apart = np.abs(found.column("score").to_numpy() - expected.column("score").to_numpy())
    return {"same labels": float(same.mean()), "scores apart": float(apart.max())}


@dataclass
class Workload:
    """One input, and the commands of all that run over it; the first one's outputs are what others are held against."""

    name: str
    rows: pa.Table
    commands: dict[str, list[str]]
    drift: Callable[[Path, Path], dict[str, float]]


def texts(given: argparse.Namespace, folder: Path) -> Workload:
    models = graphs(folder)
    commands = {
        "naive": ours("naive", folder, minilm(), models.float32 / "model.onnx", {}),
        "best": ours("best", folder, minilm(), models.float32 / "model.onnx", {}),
        "best-int8": ours("best", folder, minilm(), models.int8 / "model.onnx", {}),
        "rowmill": ours("rowmill", folder, models.float32, models.float32, given.set),
        "rowmill-int8": ours("rowmill", folder, models.int8, models.int8, given.set),
    }
    if given.peers is not None:
        asked = {name: peer for name, peer in PEERS.items() if given.only is None or name in given.only}
        peers, missing = working(given.peers, asked, "embedding.py", [str(models.float32)])
        commands |= peers
        for name, reason in missing.items():
            print(f"{name} does not work here: {reason}")
    rows = pa.table({"id": range(given.rows), "text": corpus(given.rows, minilm())})
    return Workload("texts", rows, commands, drift)


def images(given: argparse.Namespace, folder: Path) -> Workload:
    model = build_vit(folder / "vit", labels=LABELS, size="small")
    names = ("naive-pictures", "torch-pictures", "best-pictures", "rowmill-pictures")
    commands = {name: ours(name, folder, model, model, given.set) for name in names}
    rows = pa.table({"id": range(given.pictures), "image": pictures(given.pictures)})
    return Workload("pictures", rows, commands, label_drift)


def run(workload: Workload, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that was measured, as it goes into the JSON file."""
    source, warm = folder / f"{workload.name}.parquet", folder / f"{workload.name}-warm.parquet"
    pq.write_table(workload.rows, source)
    pq.write_table(workload.rows.slice(0, 100), warm)
    chosen = [name for name in workload.commands if given.only is None or name in given.only]
    variants: list[Variant] = []
    try:
        for name in chosen:
            variants.append(start(name, workload.commands[name], folder))
            variants[-1].line()
        measure(variants, source, warm, given.rounds, folder)
    finally:
        for variant in variants:
            variant.end()
    found: dict[str, Any] = {"rows": workload.rows.num_rows, "variants": {}, "lines": []}
    for variant in variants:
        apart = workload.drift(folder / f"{variant.name}-0", folder / f"{variants[0].name}-0")
        found["variants"][variant.name] = {
            "seconds": variant.seconds, "cpu": variant.cpu, "facts": variant.facts, "drift": apart
        }  # fmt: skip
    found["lines"] = [asdict(line) for line in lines({variant.name: variant for variant in variants})]
    return found


@dataclass
class Line:
    """One variant against another: times as fast, by wall and by processor seconds; median, least and most."""

    one: str
    other: str
    target: float | None
    wall: tuple[float, float, float]
    cpu: tuple[float, float, float]

    @property
    def reached(self) -> bool:
        return self.target is None or self.wall[0] >= self.target


def lines(by_name: Mapping[str, Variant]) -> list[Line]:
    return [
        Line(one, other, target, ratios(by_name[one].seconds, by_name[other].seconds),
             ratios(by_name[one].cpu, by_name[other].cpu))
        for (one, other), target in TARGETS.items()
        if one in by_name and other in by_name
    ]  # fmt: skip


def show(name: str, found: dict[str, Any]) -> None:
    rows = found["rows"]
    print(f"{name}, {rows} rows\n{'variant':17} {'rows/s':>7} {'least':>7} {'most':>7} {'cpu s':>7}  drift")
    for variant, measured in found["variants"].items():
        seconds = measured["seconds"]
        apart = ", ".join(f"{what} {number:.6f}" for what, number in measured["drift"].items())
        print(f"{variant:17} {rows / statistics.median(seconds):7.0f} {rows / max(seconds):7.0f} "
              f"{rows / min(seconds):7.0f} {statistics.median(measured['cpu']):7.2f}  {apart}")  # fmt: skip
    for line in found["lines"]:
        made = Line(**line)
        wanted = "" if made.target is None else f"; wanted {made.target}: {'reached' if made.reached else 'missed'}"
        print(f"{made.one} against {made.other}: {made.wall[0]:.2f} times ({made.wall[1]:.2f} to {made.wall[2]:.2f}; "
              f"by processor seconds {made.cpu[0]:.2f}){wanted}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6000, help="texts")
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workload", choices=["texts", "pictures"], help="this one only")
    parser.add_argument("--peers", type=Path, help="folder for the peers' virtual environments; without it, no peers")
    parser.add_argument("--only", nargs="+", help="variants by name")
    parser.add_argument("--strict", action="store_true", help="fail when a target is missed")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file, for onnx_plot")
    parser.add_argument("--set", type=json.loads, default={}, help="engine_options of Rowmill, as JSON")
    given = parser.parse_args()
    everything: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rowmill-onnx-") as name:
        for make in (texts, images):
            if given.workload not in (None, {texts: "texts", images: "pictures"}[make]):
                continue
            workload = make(given, Path(name))
            everything[workload.name] = run(workload, given, Path(name))
            if given.json is not None:
                given.json.write_text(json.dumps(everything, indent=1))
    for name, found in everything.items():
        show(name, found)
    missed = any(not Line(**line).reached for found in everything.values() for line in found["lines"])
    sys.exit(1 if given.strict and missed else 0)


if __name__ == "__main__":
    main()
