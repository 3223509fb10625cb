"""What the scripts of this folder share: one look, and SVG files with the same bytes from the same numbers."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
INK, GREY, PALE = "#24292f", "#6b7685", "#d8dee6"
#: Colours that are told apart by all eyes, for what the pictures are about.
BLUE, ORANGE, GREEN, RED, LILAC = "#3b6fb6", "#d9772b", "#4f9d69", "#b04a5a", "#8667a8"


def new(width: float, height: float) -> Figure:
    """An empty white figure of this size in inches, drawn without a display."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    return figure


def bare(axes: Axes) -> None:
    """Takes the frame, ticks and numbers away from axes that hold a drawing."""
    axes.set_axis_off()


def save(figure: Figure, path: Path) -> None:
    """Writes an SVG without a date or random names; letters are outlines, with the text beside them as a comment."""
    with matplotlib.rc_context({"svg.hashsalt": "lowmem", "svg.fonttype": "path"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
