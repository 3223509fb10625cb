"""The picture of a comparison: how the loss falls, and what memory the optimizer takes for it."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from lowmem_optim.cli.run import Run

COLORS = ["#3b6fb6", "#d9772b", "#3a9a6b", "#a45aa0", "#8c6d46", "#c24d5c", "#5b6770", "#b3a22c"]
GREY = "#5b6770"


def draw(path: Path, runs: list[Run], title: str) -> None:
    """Writes a PNG: training loss (smoothed) and validation loss by step, beside state bytes per parameter."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=GREY)
    losses, memory = figure.subplots(1, 2, width_ratios=[3, 1.2])
    _draw_losses(losses, runs)
    _draw_state(memory, runs)
    for axes in (losses, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_losses(axes: Axes, runs: list[Run]) -> None:
    for run, color in zip(runs, _colors(runs), strict=True):
        steps = range(1, len(run.training_loss) + 1)
        axes.plot(steps, run.training_loss, color=color, alpha=0.15, linewidth=0.8)
        axes.plot(steps, smoothed(run.training_loss), color=color, linewidth=1.6, label=_label(run))
        if run.validation_loss:
            points = zip(*run.validation_loss, strict=True)
            axes.plot(*points, "o", color=color, markersize=6, markeredgecolor="white", zorder=3)
    axes.set_yscale("log")  # late differences are small beside the first steps' fall
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.25)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats/byte")
    axes.set_title("line: training, smoothed    dots: validation", fontsize=9, loc="left", color=GREY)
    axes.legend(frameon=False)


def _draw_state(axes: Axes, runs: list[Run]) -> None:
    values = [run.state_bytes / run.parameters for run in runs]
    bars = axes.barh(range(len(runs)), values, color=_colors(runs), height=0.5)
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.set_yticks(range(len(runs)), [run.label for run in runs])
    axes.set_ylim(max(len(runs), 4) - 0.5, -0.5)  # first run on top; a few runs do not fill the height
    axes.set_xlim(0, max(*values, 1) * 1.15)
    axes.set_title("optimizer state, bytes/parameter", fontsize=9, loc="left", color=GREY)


def smoothed(losses: list[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the steps, without the start's bias towards zero."""
    decay = 1 - 1 / max(len(losses) / 50, 1)
    average = weight = 0.0
    result = []
    for loss in losses:
        average = decay * average + (1 - decay) * loss
        weight = decay * weight + (1 - decay)
        result.append(average / weight)
    return result


def _label(run: Run) -> str:
    loss = "" if run.final_loss is None else f" {run.final_loss:.3f}"
    return run.label + loss + ("" if run.status == "finished" else f" ({run.status})")


def _colors(runs: list[Run]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]
