"""Draw the README's picture: loss against bits per weight, reallm beside the methods of NAME=quality.

    python -m benchmarks.draw_quality_figure

Reads benchmarks/results/quality.json and writes docs/_static/quality.svg and docs/_static/quality.png. The picture has
an opaque light background, so that it can be read on a light page and on a dark one. The same results give the same
bytes.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reallm.kernels.storage.atomic import write_bytes_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
OUTPUT = ROOT / "docs" / "_static"
PEERS = {
    "AutoRound": ("#b23a1e", "s"),
    "GPTQ": ("#7657a8", "^"),
    "HQQ": ("#5a646b", "D"),
    "NF4": ("#2f7d3b", "P"),
    "LoftQ": ("#a9660a", "X"),
}
"""First word of a method's name -> colour, marker."""
OFFSET = (8, 4)
OFFSETS = {
    "AutoRound 2 bits g64": (8, -6),
    "GPTQ 4 bits g64": (-38, -17),
    "HQQ 4 bits g64": (-30, 10),
    "NF4 4 bits g64": (-30, -4),
}
"""Offsets of labels from their points, in points; OFFSET for all others."""
REDUNDANT = {"NF4 4 bits g64": " 4-bit g64", "LoftQ 4 bits g64": " 4-bit g64"}
"""Endings of labels that are left out: the method is shown in one setting only."""
OURS, INK, MUTED, LINE, PAPER = "#17697a", "#15191c", "#5a646b", "#d8dee0", "#ffffff"
WIDTH, HEIGHT = 8.4, 4.7
"""Inches."""
PNG_DPI = 160
SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "svg.hashsalt": "reallm",
    "svg.fonttype": "path",
    "axes.unicode_minus": False,
}

Point = tuple[float, float]
"""(bits per weight, KL in nats per token)."""


def curve(rows: list[dict[str, Any]]) -> list[Point]:
    """Our plans, one at each size, from the smallest to the largest."""
    return sorted({(round(row["ours_bits_per_weight"], 3), row["ours"]) for row in rows})


def peers(rows: list[dict[str, Any]]) -> dict[str, Point]:
    """The point of every method in PEERS, by the method's full name."""
    return {
        row["peer_name"]: (row["peer_bits_per_weight"], row["peer"])
        for row in rows
        if row["peer_name"].partition(" ")[0] in PEERS
    }


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure of the rows of quality.json."""
    with style.context(["default", SETTINGS]):
        figure = Figure(figsize=(WIDTH, HEIGHT), facecolor=PAPER, layout="constrained")
        axes = figure.add_subplot()
        _dress(axes)
        bits, loss = zip(*curve(rows), strict=True)
        axes.plot(bits, loss, color=OURS, linewidth=2.4, marker="o", markersize=6, zorder=3)
        axes.annotate(
            "reallm", (bits[-1], loss[-1]), xytext=(8, -3), textcoords="offset points", color=OURS, weight="bold"
        )
        for name, point in peers(rows).items():
            colour, marker = PEERS[name.partition(" ")[0]]
            axes.plot(*point, color=colour, marker=marker, markersize=8, linestyle="", zorder=2)
            offset, text = (
                OFFSETS.get(name, OFFSET),
                name.replace(" bits g", "-bit g").removesuffix(REDUNDANT.get(name, "")),
            )
            axes.annotate(text, point, xytext=offset, textcoords="offset points", color=colour, fontsize=9.5)
        return figure


def _dress(axes: Axes) -> None:
    """Scales, grid, labels."""
    axes.set_facecolor(PAPER)
    axes.set_yscale("log")
    axes.set_xlim(1.6, 5.6)
    axes.set_ylim(0.009, 15)
    ticks = [0.01, 0.03, 0.1, 0.3, 1, 3, 10]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("bits per weight, every byte counted", color=INK)
    axes.set_ylabel("KL to the float32 model, nats per token", color=INK)
    axes.set_title("Loss against size, SmolLM2-135M on WikiText-2: lower is better", color=INK, loc="left", fontsize=12)


def render(figure: Figure, kind: str) -> bytes:
    """The file's bytes: `kind` is svg or png."""
    target = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with style.context(["default", SETTINGS]):
        figure.savefig(target, format=kind, dpi=PNG_DPI, metadata=metadata)
    return target.getvalue()


def main() -> None:
    """Write both files and say so."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    for kind in ("svg", "png"):
        path = OUTPUT / f"quality.{kind}"
        write_bytes_atomic(path, render(draw(rows), kind))
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
