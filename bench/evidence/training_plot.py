"""The picture of the training section: validation losses, and the optimizer's milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lowmem_optim.cli.plot import COLORS, GREY


def draw(path: Path, rows: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]], title: str) -> None:
    """Write a PNG: validation loss by tokens, dashed where rounded to nearest, beside milliseconds in the optimizer."""
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    colors = dict(zip(names, COLORS * len(names), strict=False))
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=GREY)
    losses, times = figure.subplots(1, 2, width_ratios=[3, 1.4])
    for row in rows:
        own = [c for c in curves if all(c[key] == row[key] for key in ("optimizer", "stochastic_rounding"))]
        stochastic = row["stochastic_rounding"] == "True"
        losses.plot(
            *zip(*((each["tokens"] / 1e6, each["validation_loss"]) for each in own), strict=True) if own else ([], []),
            color=colors[row["optimizer"]],
            linestyle="-" if stochastic else "--",
            marker=".",
            label=row["optimizer"] if stochastic else None,
        )
    losses.set_xlabel("million bytes of text")
    losses.set_ylabel("validation loss, nats/byte")
    losses.set_title("line: stochastic rounding    dashes: to nearest", fontsize=9, loc="left", color=GREY)
    losses.legend(frameon=False, fontsize=8)
    labels = [f"{row['optimizer']}{'' if row['stochastic_rounding'] == 'True' else ', nearest'}" for row in rows]
    bars = times.barh(
        range(len(rows)), [row["optimizer_ms"] or 0 for row in rows], color=[colors[row["optimizer"]] for row in rows]
    )
    times.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    times.set_yticks(range(len(rows)), labels, fontsize=8)
    times.invert_yaxis()
    times.set_title("optimizer, ms a step", fontsize=9, loc="left", color=GREY)
    for axes in (losses, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
