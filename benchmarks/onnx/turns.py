"""Variants that sit loaded in processes of their own and take turns on the same file, round after round."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.process_tree import tree_seconds


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
        """``seconds``, ``cpu`` (its own count, or that of its processes meanwhile) and ``facts`` of one turn."""
        assert self.process.stdin is not None
        used = tree_seconds(self.process.pid)
        self.process.stdin.write(f"{source}\t{output}\n")
        self.process.stdin.flush()
        result: dict[str, Any] = json.loads(self.line())
        result.setdefault("cpu", tree_seconds(self.process.pid) - used)
        return result

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start(name: str, command: list[str], folder: Path) -> Variant:
    log = folder / f"{name}.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "ORT_DISABLE_TELEMETRY": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    return Variant(name, process, log)


def measure(variants: list[Variant], source: Path, warm: Path, rounds: int, folder: Path) -> None:
    """``rounds`` turns of each over ``source``, after one over ``warm``; outputs are in ``folder``, NAME-ROUND."""
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
                f"  {number} {variant.name:16} {result['seconds']:7.2f} s  {result['cpu']:7.2f} cpu s",
                file=sys.stderr,
                flush=True,
            )


def ratios(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast the first is: median, least and most over the rounds."""
    found = [b / a for a, b in zip(one, other, strict=True)]
    return statistics.median(found), min(found), max(found)
