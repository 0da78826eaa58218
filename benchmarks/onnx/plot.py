"""Draws what ``python -m benchmarks.onnx --json FILE`` measured: ``python -m benchmarks.onnx.plot FILE docs/….svg``."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

NAMES = {
    "naive": "session.run, batches of 32",
    "best": "the best bare loop",
    "best-int8": "the best bare loop, int8",
    "rowmill": "Rowmill",
    "rowmill-int8": "Rowmill, int8",
    "st-torch": "sentence-transformers",
    "st-onnx": "sentence-transformers, ONNX",
    "fastembed": "fastembed",
    "infinity": "infinity, PyTorch",
    "ray": "Ray Data, the best loop's batches",
    "naive-pictures": "session.run, batches of 8",
    "torch-pictures": "Transformers' pipeline, PyTorch",
    "best-pictures": "the best bare loop",
    "rowmill-pictures": "Rowmill",
}
TITLES = {"texts": "Texts to embeddings, all-MiniLM-L6-v2", "pictures": "JPEG files to labels, a ViT of DeiT-Ti's size"}


def main() -> None:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "rowmill"  # the same numbers, the same file
    from matplotlib import pyplot as plt

    workloads: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    heights = [len(found["variants"]) for found in workloads.values()]
    figure, panels = plt.subplots(
        len(workloads), 1, figsize=(8, 0.9 + sum(0.75 + 0.3 * n for n in heights)), height_ratios=heights, squeeze=False
    )
    for axes, (name, found) in zip(panels[:, 0], workloads.items(), strict=True):
        draw(axes, found)
        axes.set_title(TITLES.get(name, name), loc="left", fontsize=11)
    panels[-1, 0].set_xlabel("rows a second: median, least and most over the rounds")
    figure.tight_layout()
    figure.savefig(sys.argv[2], metadata={"Date": None} if sys.argv[2].endswith("svg") else None)


def draw(axes: Any, found: dict[str, Any]) -> None:
    """Horizontal bars, the fastest on top."""
    rates = {
        name: [found["rows"] / seconds for seconds in measured["seconds"]]
        for name, measured in found["variants"].items()
    }
    names = sorted(rates, key=lambda name: statistics.median(rates[name]))
    medians = [statistics.median(rates[name]) for name in names]
    low = [at - min(rates[name]) for at, name in zip(medians, names, strict=True)]
    high = [max(rates[name]) - at for at, name in zip(medians, names, strict=True)]
    colors = ["#1f6feb" if name.startswith("rowmill") else "#8b949e" for name in names]
    axes.barh(names, medians, xerr=(low, high), color=colors, height=0.7, error_kw={"elinewidth": 1, "capsize": 2})
    for at, (median, more) in enumerate(zip(medians, high, strict=True)):
        axes.annotate(
            f"{median:,.0f}", (median + more, at), (5, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names], fontsize=9)
    axes.set_xlim(0, 1.1 * max(at + more for at, more in zip(medians, high, strict=True)))
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
