"""Draws what ``benchmarks/llm.py --json FILE`` measured: ``python -m benchmarks.llm_plot FILE docs/llm.svg``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NAMES = {"floor": "LLM.generate, all at once", "chunks": "LLM.generate, 256 at a time", "run_batch": "vllm run-batch"}


def main() -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "rowmill"  # the same numbers, the same file
    from matplotlib import pyplot as plt

    lines: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())["lines"]
    workloads = list(dict.fromkeys(line["workload"] for line in lines))
    against = list(dict.fromkeys(line["against"] for line in lines))
    figure, axes = plt.subplots(figsize=(8, 3.6))
    width = 0.8 / len(against)
    for n, kind in enumerate(against):
        found = {line["workload"]: line for line in lines if line["against"] == kind}
        at = [x for x, name in enumerate(workloads) if name in found]
        ratios = [found[workloads[x]]["ratio"] for x in at]
        low = [found[workloads[x]]["ratio"] - found[workloads[x]]["low"] for x in at]
        high = [found[workloads[x]]["high"] - found[workloads[x]]["ratio"] for x in at]
        places = [x + (n - (len(against) - 1) / 2) * width for x in at]
        axes.bar(places, ratios, width * 0.9, yerr=(low, high), capsize=3, label=NAMES.get(kind, kind))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("times as fast as")
    axes.set_title("Rowmill against vLLM itself: medians of ratios within a round, and their range")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
