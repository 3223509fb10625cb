"""The picture of `lowmem bench`: how close each step comes to the rate of a copy, and how long it takes."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lowmem_optim.cli.bench_rows import Row
from lowmem_optim.cli.plot import GREY

COLOURS = {"ours": "#3b6fb6", "other": "#d9772b", "copy": GREY}


def draw(path: Path, rows: list[Row], parameters: int, title: str) -> None:
    """Writes a PNG: GB/s by least bytes per parameter under the line of the copy, beside the milliseconds of a step."""
    timed = [row for row in rows if row.ms is not None]
    figure = Figure(figsize=(12, max(4.5, 0.36 * len(timed) + 1.5)), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=GREY)
    roof, bars = figure.subplots(1, 2, width_ratios=[1, 1.2])
    _draw_roof(roof, timed, parameters)
    _draw_bars(bars, timed)
    for axes in (roof, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")


def _draw_roof(axes: Axes, rows: list[Row], parameters: int) -> None:
    points = [(row, row.least_bytes / parameters, row.gb_per_s) for row in rows if row.least_bytes and row.gb_per_s]
    copy = next(rate for row, _, rate in points if row.kind == "copy")
    axes.axhline(copy, color=COLOURS["copy"], linestyle="--", linewidth=1)
    axes.text(
        0.99,
        copy,
        f"copy, measured: {copy:,.1f} GB/s ",
        color=GREY,
        fontsize=8,
        ha="right",
        va="bottom",
        transform=axes.get_yaxis_transform(),
    )
    top, right = 1.15 * max(rate for _, _, rate in points), 1.4 * max(width for _, width, _ in points)
    labels: list[tuple[float, float]] = []
    for row, width, rate in sorted(points, key=lambda point: point[2]):
        if row.kind == "copy":
            continue
        axes.plot(width, rate, "o", color=COLOURS[row.kind])
        # a label that would lie on one further down moves up
        height = rate
        for other, taken in labels:
            if abs(other - width) < 0.28 * right and height - taken < 0.03 * top:
                height = taken + 0.03 * top
        labels.append((width, height))
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 1}
        place = (width + 0.03 * right, height)
        axes.annotate(row.contender, (width, rate), place, fontsize=7, va="center", arrowprops=line)
    axes.set_ylim(0, top)
    axes.set_xlim(0, right)
    axes.set_xlabel("least bytes per parameter, by formula")
    axes.set_ylabel("GB/s: those bytes by the measured time")


def _draw_bars(axes: Axes, rows: list[Row]) -> None:
    ordered = sorted(((row, row.ms) for row in rows if row.ms is not None), key=lambda pair: pair[1][1])
    medians = [ms[1] for _, ms in ordered]
    spread = [[ms[1] - ms[0] for _, ms in ordered], [ms[2] - ms[1] for _, ms in ordered]]
    bars = axes.barh(
        range(len(ordered)), medians, xerr=spread, ecolor=GREY, color=[COLOURS[row.kind] for row, _ in ordered]
    )
    axes.bar_label(bars, fmt=" {:,.4g}", fontsize=8)
    axes.set_yticks(range(len(ordered)), [row.contender for row, _ in ordered], fontsize=8)
    axes.invert_yaxis()  # the fastest on top
    axes.set_xlim(0, 1.15 * max(ms[2] for _, ms in ordered))
    axes.set_xlabel("ms a step: median, 20th to 80th percentile")
