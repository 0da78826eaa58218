"""Rows whose model costs next to nothing: what the pipeline itself takes, against the bare loop and against peers.

Each turn is a whole process, Parquet to Parquet, from start to end; contenders take turns within a round, and ratios
are of one round. Processor seconds (user and system, of the process and all that it started) are what counts on a
machine that is shared; wall seconds stand beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.environments import Peer, working
from benchmarks.jobs.memory import ROWMILL
from benchmarks.rows.workloads import WORKLOADS

PEERS = {"daft": Peer(("daft==0.7.26", "onnxruntime", "numpy", "pyarrow"))}
TARGETS = {"mlp": 2.0, "wide": 1.5}
"""Most processor seconds, by those of the bare loop: of 10⁶ rows of ``mlp``."""


@dataclass
class Contender:
    """One turn's measures by round: seconds of the wall and of processors, peak memory in bytes."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)


def run(command: Sequence[str], environment: dict[str, str]) -> tuple[float, float, int]:
    """Wall seconds, processor seconds and peak memory of one process with those that it waited for."""
    # Whoever has installed Rowmill has its bytecode, too.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=inherited | environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {said.read()[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def commands(peers: dict[str, list[str]], settings: Sequence[str]) -> dict[str, list[str]]:
    script = Path(__file__).parents[1] / "peers" / "rows.py"
    own = [str(ROWMILL), "run", "--quiet", *(part for item in settings for part in ("--setting", item))]
    return {"bare": [sys.executable, str(script), "bare"], "rowmill": own} | peers


def turn(
    name: str, command: list[str], workload: str, source: Path, folder: Path, rows: int
) -> tuple[float, float, int]:
    """Run one contender, and count what it wrote."""
    work, output = WORKLOADS[workload], folder / f"out-{name}"
    model = str(folder / f"{workload}.onnx") if work.model else "fake"
    shutil.rmtree(output, ignore_errors=True)
    if name == "rowmill":
        shutil.rmtree(folder / "data", ignore_errors=True)
        arguments = [str(source), "-o", str(output), "-m", model, *work.arguments, "--data-dir", str(folder / "data")]
    else:
        output.mkdir()
        arguments = [workload, str(source), model, str(output)]
    measured = run([*command, *arguments], {"ROWMILL_CACHE_DIR": str(folder / "cache"), "ORT_DISABLE_TELEMETRY": "1"})
    written = sum(pq.read_metadata(path).num_rows for path in output.rglob("*.parquet"))
    if written != rows:
        raise SystemExit(f"{name} wrote {written:,} rows of {rows:,}")
    return measured


def measure(
    workload: str, rows: int, rounds: int, contenders: dict[str, list[str]], folder: Path
) -> dict[str, Contender]:
    work, source = WORKLOADS[workload], folder / f"{workload}-{rows}.parquet"
    if not source.exists():
        work.write(source, rows)
    if work.model and not (model := folder / f"{workload}.onnx").exists():
        work.model(model)
    found = {name: Contender() for name in contenders}
    for number in range(rounds):
        # The other way round every second time: what the turn before leaves behind hits each of them.
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            seconds, cpu, peak = turn(name, contenders[name], workload, source, folder, rows)
            found[name].seconds.append(seconds)
            found[name].cpu.append(cpu)
            found[name].peak.append(peak)
            print(f"  {number} {name:8} {cpu:7.2f} cpu s  {seconds:7.2f} s", file=sys.stderr, flush=True)
    return found


def report(workload: str, rows: int, found: dict[str, Contender]) -> None:
    print(f"{WORKLOADS[workload].title}: {rows:,} rows")
    print(f"{'':8}  {'cpu s':>6}  {'by bare':>20}  {'wall s':>6}  {'by bare':>20}  {'rows/s':>9}  {'peak MiB':>8}")
    for name, measured in found.items():
        columns = []
        for own, bare in ((measured.cpu, found["bare"].cpu), (measured.seconds, found["bare"].seconds)):
            ratios = [a / b for a, b in zip(own, bare, strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            columns.append(f"{statistics.median(own):>6.2f}  {spread:>20}")
        rate = rows / statistics.median(measured.seconds)
        print(f"{name:8}  {'  '.join(columns)}  {rate:>9,.0f}  {max(measured.peak) / 2**20:>8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=sorted(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--peers", type=Path, metavar="DIR", help="install the peers there, each in its environment")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="a setting of Rowmill's")
    parser.add_argument("--folder", type=Path, help="keep inputs and outputs there")
    parser.add_argument("--json", type=Path, help="write what was measured there")
    parser.add_argument("--strict", action="store_true", help="fail when a target is missed")
    options = parser.parse_args()
    peers, missing = working(options.peers, PEERS, "rows.py", []) if options.peers else ({}, {})
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    results, late = {}, []
    with tempfile.TemporaryDirectory(prefix="rowmill-rows-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for workload in options.only:
            found = measure(workload, options.rows, options.rounds, commands(peers, options.setting), folder)
            report(workload, options.rows, found)
            results[workload] = {"rows": options.rows, "contenders": {n: asdict(one) for n, one in found.items()}}
            pairs = zip(found["rowmill"].cpu, found["bare"].cpu, strict=True)
            ratio = statistics.median(own / bare for own, bare in pairs)
            if ratio > TARGETS.get(workload, float("inf")):
                late.append(
                    f"{workload}: {ratio:.2f} of the bare loop's processor seconds, the aim is {TARGETS[workload]}"
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    print("\n".join(late))
    sys.exit(1 if late and options.strict else 0)


if __name__ == "__main__":
    main()
