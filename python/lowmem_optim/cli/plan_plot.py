"""The picture of `lowmem plan`: what each optimizer takes, as stacked bars beside the line of the device."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lowmem_optim.cli.plan_memory import PARTS, Row
from lowmem_optim.cli.plan_report import unit_of
from lowmem_optim.cli.plot import GREY

COLOURS = {
    "parameters": "#3b6fb6",
    "gradients": "#d9772b",
    "state": "#4f9d69",
    "temporaries": "#b04a5a",
    "activations": "#a9b7c9",
    "communication": "#8667a8",
}


def draw(path: Path, rows: list[Row], title: str, gpu: int | None) -> None:
    """Writes a PNG with a bar for each row, the least on top."""
    figure = Figure(figsize=(11, 0.3 * len(rows) + 1.8), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=GREY)
    axes = figure.subplots()
    unit, size = unit_of(rows)
    places = range(len(rows))
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [(getattr(row, part) or 0) / size for row in rows]
        if any(widths):
            axes.barh(places, widths, left=left, color=COLOURS[part], label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.text(total, place, f" {total:,.1f}", va="center", fontsize=7, color=GREY)
    if gpu is not None:
        axes.axvline(gpu / size, color="black", linestyle="--", linewidth=1, label=f"{gpu / size:,.10g} {unit}")
    names = [f"{row.optimizer}, {row.mode}" for row in rows]
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the least on top
    axes.set_xlim(0, 1.08 * max([*left, (gpu or 0) / size]))
    axes.set_xlabel(f"{unit} on each device")
    axes.legend(fontsize=8, frameon=False, loc="lower right" if not gpu else "best")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
