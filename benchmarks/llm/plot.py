"""Draws what ``python -m benchmarks.llm --json FILE`` measured: ``python -m benchmarks.llm.plot FILE docs/….svg``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NAMES = {
    "floor": "LLM.generate, all at once",
    "chunks": "LLM.generate, 256 at a time",
    "run_batch": "vllm run-batch",
    "ray": "Ray Data LLM",
    "daft": "Daft",
}
COLORS = ("#1f6feb", "#8b949e", "#bf8700", "#8250df", "#1a7f37")
TITLES = {
    "uniform": "uniform",
    "skewed": "skewed lengths",
    "duplicates": "a fifth repeats",
    "chat": "chat",
    "prefixes": "shared prefixes,\nshuffled",
    "chat-duplicates": "chat,\nrepeats",
    "chat-prefixes": "chat,\nprefixes",
}


def main() -> None:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "rowmill"  # the same numbers, the same file
    from matplotlib import pyplot as plt

    lines: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())["lines"]
    workloads = list(dict.fromkeys(line["workload"] for line in lines))
    kinds = [kind for kind in NAMES if any(line["against"] == kind for line in lines)]
    figure, axes = plt.subplots(figsize=(9, 4.2))
    at, ticks, named = 0.0, [], set()
    for workload in workloads:
        found = [line for kind in kinds for line in lines if (line["workload"], line["against"]) == (workload, kind)]
        ticks.append(at + (len(found) - 1) / 2)
        for line in found:
            kind = line["against"]
            spread = ((line["ratio"] - line["low"],), (line["high"] - line["ratio"],))
            label = None if kind in named else NAMES[kind]
            named.add(kind)
            axes.bar(at, line["ratio"], 0.9, yerr=spread, capsize=3, color=COLORS[kinds.index(kind)], label=label)
            axes.annotate(
                f"{line['ratio']:.2f}", (at, line["high"]), (0, 4), textcoords="offset points", ha="center", fontsize=8
            )
            if line["target"] is not None:
                axes.hlines(line["target"], at - 0.45, at + 0.45, color="black", linewidth=1.2, linestyle=(0, (2, 1)))
            at += 1
        at += 0.8
    axes.axhline(1, color="black", linewidth=0.8, zorder=0)
    axes.set_xticks(ticks, [TITLES.get(name, name) for name in workloads])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("times as fast as …")
    axes.set_title("Rowmill against others on the same vLLM: median and range of the ratios within a round;\n"
                   "dashed: the aim", fontsize=10, loc="left")  # fmt: skip
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(sys.argv[2], metadata={"Date": None} if sys.argv[2].endswith("svg") else None)


if __name__ == "__main__":
    main()
