"""Texts to embeddings, Parquet to Parquet, on ONNX Runtime: Rowmill, the loop it has to keep up with, and its peers.

The variants sit loaded in processes of their own and take turns on the same file, round after round, so that a busy
machine slows all of them. Each cell is the median over the rounds of the ratio to the same round's other turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import onnx_peers
from benchmarks.onnx_models import graphs, minilm

TARGETS = {
    ("rowmill", "best"): 0.95,
    ("rowmill", "naive"): 3.5,
    ("rowmill", "st-torch"): 2.0,
    ("rowmill", "st-onnx"): 1.4,
    ("rowmill-int8", "rowmill"): 1.7,
}
"""Least ratio of rows per second, wanted on a quiet machine."""


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


@dataclass
class Variant:
    """A process that answers turns; ``seconds`` and ``cpu`` (processor seconds) by round."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if not said:
            last = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise SystemExit(f"{self.name} ended with {self.process.wait()}: {last}")
        return said

    def turn(self, source: Path, output: Path) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{source}\t{output}\n")
        self.process.stdin.flush()
        result: dict[str, Any] = json.loads(self.line())
        return result


def start(name: str, command: list[str], folder: Path) -> Variant:
    log = folder / f"{name}.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "ORT_DISABLE_TELEMETRY": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    return Variant(name, process, log)


def ours(name: str, folder: Path, model: Path, graph: Path, options: dict[str, Any]) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.onnx_variants", name, str(model), str(graph)]
    return [*command, "--folder", str(folder / "rowmill"), "--options", json.dumps(options)]


def embeddings(output: Path) -> Any:
    table = pq.read_table(sorted(output.glob("**/*.parquet")))
    column: Any = table.column("embedding").combine_chunks()
    return np.asarray(column.flatten(), dtype=np.float32).reshape(len(column), -1)


def measure(variants: list[Variant], source: Path, warm: Path, rounds: int, folder: Path) -> None:
    for variant in variants:
        variant.turn(warm, folder / f"{variant.name}-warm")
    for number in range(rounds):
        # The other way round every second time: what the turn before leaves behind hits each of them.
        for variant in variants if number % 2 == 0 else variants[::-1]:
            result = variant.turn(source, folder / f"{variant.name}-{number}")
            variant.seconds.append(result["seconds"])
            variant.cpu.append(result["cpu"])
            variant.facts = result["facts"]
            print(
                f"  {number} {variant.name:14} {result['seconds']:7.2f} s  {result['cpu']:7.2f} cpu s", file=sys.stderr
            )


def plot(variants: list[Variant], rows: int, path: Path) -> None:
    """Median rows per second as horizontal bars, the fastest first."""
    rates = sorted(((rows / statistics.median(v.seconds), v.name) for v in variants), reverse=True)
    width, high, left = 460, 26, 130
    size = f'width="{left + width + 80}" height="{high * len(rates) + 12}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">']
    for number, (rate, name) in enumerate(rates):
        top, color = 6 + number * high, "#1f6feb" if name.startswith("rowmill") else "#8b949e"
        length = width * rate / rates[0][0]
        lines.append(f'<text x="{left - 8}" y="{top + 15}" text-anchor="end" fill="#57606a">{name}</text>')
        lines.append(f'<rect x="{left}" y="{top}" width="{length:.1f}" height="{high - 6}" fill="{color}"/>')
        lines.append(f'<text x="{left + length + 6:.1f}" y="{top + 15}" fill="#57606a">{rate:,.0f}</text>')
    path.write_text("\n".join([*lines, "</svg>"]) + "\n", encoding="utf-8")


def ratio(one: list[float], other: list[float]) -> float:
    """How many times as fast the first is."""
    return statistics.median(b / a for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="folder for the peers' virtual environments; without it, no peers")
    parser.add_argument("--only", nargs="+", help="variants by name")
    parser.add_argument("--strict", action="store_true", help="fail when a target is missed")
    parser.add_argument("--plot", type=Path, help="write the rows per second as a bar chart to this SVG file")
    parser.add_argument("--set", type=json.loads, default={}, help="engine_options of Rowmill, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rowmill-onnx-") as name:
        folder = Path(name)
        texts = corpus(given.rows, minilm())
        pq.write_table(pa.table({"text": texts}), folder / "texts.parquet")
        pq.write_table(pa.table({"text": texts[:100]}), folder / "warm.parquet")
        models = graphs(folder)
        commands = {
            "naive": ours("naive", folder, minilm(), models.float32 / "model.onnx", {}),
            "best": ours("best", folder, minilm(), models.float32 / "model.onnx", {}),
            "best-int8": ours("best", folder, minilm(), models.int8 / "model.onnx", {}),
            "rowmill": ours("rowmill", folder, models.float32, models.float32, given.set),
            "rowmill-int8": ours("rowmill", folder, models.int8, models.int8, given.set),
        }
        if given.peers is not None:
            peers, missing = onnx_peers.commands(given.peers, models.float32)
            commands |= peers
            for name, reason in missing.items():
                print(f"{name} does not work here: {reason}")
        chosen = [n for n in commands if given.only is None or n in given.only]
        variants = [start(n, commands[n], folder) for n in chosen]
        try:
            for variant in variants:
                variant.line()
            measure(variants, folder / "texts.parquet", folder / "warm.parquet", given.rounds, folder)
            reached = report(variants, given.rows, folder)
            if given.plot is not None:
                plot(variants, given.rows, given.plot)
        finally:
            for variant in variants:
                variant.process.terminate()
                variant.process.wait()
    sys.exit(1 if given.strict and not reached else 0)


def report(variants: list[Variant], rows: int, folder: Path) -> bool:
    by_name = {variant.name: variant for variant in variants}
    base = variants[0]
    reference = embeddings(folder / f"{base.name}-0")
    print(f"{'variant':14} {'rows/s':>8} {'x ' + base.name:>10} {'(cpu)':>7} {'cosine mean':>12} {'min':>9}")
    for variant in variants:
        found = embeddings(folder / f"{variant.name}-0")
        cosine = (reference * found).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(reference, axis=1)
        print(
            f"{variant.name:14} {rows / statistics.median(variant.seconds):8.0f} "
            f"{ratio(variant.seconds, base.seconds):10.2f} {ratio(variant.cpu, base.cpu):7.2f} "
            f"{cosine.mean():12.6f} {cosine.min():9.6f}"
        )
    all_reached = True
    for (one, other), wanted in TARGETS.items():
        if one in by_name and other in by_name:
            found = ratio(by_name[one].seconds, by_name[other].seconds)
            cpu = ratio(by_name[one].cpu, by_name[other].cpu)
            verdict = "reached" if found >= wanted else "missed"
            all_reached = all_reached and found >= wanted
            print(
                f"{one} against {other}: {found:.2f} times (by processor seconds {cpu:.2f}); wanted {wanted}: {verdict}"
            )
    return all_reached


if __name__ == "__main__":
    main()
