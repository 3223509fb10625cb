"""The picture of the headline section: peak memory beside the plan, and tokens a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lowmem_optim.cli.plot import COLORS, GREY

GB = 1e9


def draw(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Write a PNG: for each configuration the peak and the plan, and tokens a second with one and the largest batch."""
    figure = Figure(figsize=(12, 1.6 + 0.36 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=GREY)
    memory, speed = figure.subplots(1, 2, sharey=True)
    places = [*range(len(rows))]
    bars = memory.barh(places, [(row["peak_bytes"] or 0) / GB for row in rows], color=COLORS[0], label="at the peak")
    memory.plot(
        [row["planned_total"] / GB for row in rows], places, "|", color=COLORS[1], markersize=14, label="planned"
    )
    memory.bar_label(bars, ["" if row["status"] == "ran" else row["status"] for row in rows], padding=4, fontsize=8)
    memory.set_yticks(places, [f"{row['optimizer']}, {row['mode']}" for row in rows], fontsize=8)
    memory.invert_yaxis()
    memory.set_xlabel("GB of tensors, one sequence")
    bars = speed.barh(
        places, [row["largest_tokens_per_s"] or 0 for row in rows], color=COLORS[2], label="largest batch"
    )
    speed.bar_label(bars, [_sequences(row) for row in rows], padding=4, fontsize=8)
    speed.plot(
        [row["tokens_per_s"] or 0 for row in rows], places, "|", color=COLORS[1], markersize=14, mew=2, label="one"
    )
    speed.set_xlabel("tokens a second")
    for axes in (memory, speed):
        axes.spines[["top", "right"]].set_visible(False)
        # above the bars, which may fill everything else
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130, format="png")


def _sequences(row: dict[str, Any]) -> str:
    batch = row["largest_batch"]
    if batch is None:
        return ""
    return f"{'' if row['least_too_many'] == batch + 1 else 'at least '}{batch} sequence{'s' * (batch > 1)}"
