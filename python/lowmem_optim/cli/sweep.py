"""What a sweep has found: validation losses by the values that were tried, as a table and as a heat-map."""

import math
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from lowmem_optim.cli.arguments import ABSENT
from lowmem_optim.cli.run import Run


@dataclass(frozen=True)
class Grid:
    """Runs by two properties, of which each has a name and values in the order in which they were tried."""

    title: str
    row_name: str
    column_name: str
    cells: dict[tuple[str, str], Run]
    best: list[Run]

    @property
    def rows(self) -> list[str]:
        """The first property's values."""
        return list(dict.fromkeys(row for row, _ in self.cells))

    @property
    def columns(self) -> list[str]:
        """The second property's values."""
        return list(dict.fromkeys(column for _, column in self.cells))

    def is_best(self, row: str, column: str) -> bool:
        """Whether a run is one of the best, which are marked."""
        run = self.cells.get((row, column))
        return any(run is best for best in self.best)

    def text(self, row: str, column: str) -> str:
        """A run's loss, or what became of it."""
        run = self.cells.get((row, column))
        if run is None or run.final_loss is None:
            return ABSENT if run is None else run.status
        return f"{run.final_loss:.4f}"


def grids(runs: list[Run]) -> list[Grid]:
    """Optimizers by the values of one argument, or a grid for each optimizer by those of two."""
    keys = list(runs[0].settings)
    if len(keys) == 1:
        cells = {(run.optimizer, run.settings[keys[0]]): run for run in runs}
        return [Grid("validation loss, nats/byte", "optimizer", keys[0], cells, best_of_each(runs))]
    row, column = keys
    found = []
    for best in best_of_each(runs):
        cells = {(r.settings[row], r.settings[column]): r for r in runs if r.optimizer == best.optimizer}
        found.append(Grid(f"validation loss of {best.optimizer}, nats/byte", row, column, cells, [best]))
    return found


def best_of_each(runs: list[Run]) -> list[Run]:
    """The run of each optimizer with the lowest loss, or its first where none has one."""
    each = [[run for run in runs if run.optimizer == name] for name in dict.fromkeys(run.optimizer for run in runs)]
    return [min(some, key=lambda run: math.inf if run.final_loss is None else run.final_loss) for some in each]


def sweep_table(grid: Grid, style: box.Box = box.SIMPLE_HEAD) -> Table:
    """The grid's losses, with the best marked."""
    table = Table(title=grid.title, box=style)
    table.add_column(f"{grid.row_name} / {grid.column_name}")
    for column in grid.columns:
        table.add_column(column, justify="right")
    for row in grid.rows:
        marks = ["**" if grid.is_best(row, column) else "" for column in grid.columns]
        texts = [grid.text(row, column) for column in grid.columns]
        table.add_row(row, *(f"{mark}{text}{mark}" for mark, text in zip(marks, texts, strict=True)))
    return table


def draw_sweep(path: Path, found: list[Grid]) -> None:
    """Writes a PNG with a heat-map for each grid."""
    height = sum(0.5 * len(grid.rows) + 1.1 for grid in found)
    figure = Figure(figsize=(2.5 + 1.1 * max(len(grid.columns) for grid in found), height + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(len(found), 1, squeeze=False, height_ratios=[len(grid.rows) + 1 for grid in found])
    for axes, grid in zip(every[:, 0], found, strict=True):
        losses = [[_loss(grid.cells.get((row, column))) for column in grid.columns] for row in grid.rows]
        image = axes.imshow(losses, cmap="viridis_r", aspect="auto")
        for i, row in enumerate(grid.rows):
            for j, column in enumerate(grid.columns):
                dark = losses[i][j] == losses[i][j] and image.norm(losses[i][j]) > 0.5
                style = {
                    "weight": "bold" if grid.is_best(row, column) else "normal",
                    "color": "white" if dark else "black",
                }
                axes.text(j, i, grid.text(row, column), ha="center", va="center", **style)
        axes.set_xticks(range(len(grid.columns)), grid.columns)
        axes.set_yticks(range(len(grid.rows)), grid.rows)
        axes.set_xlabel(grid.column_name)
        axes.set_ylabel("" if grid.row_name == "optimizer" else grid.row_name)
        axes.set_title(grid.title, fontsize=9, loc="left")
    figure.savefig(path, dpi=150)


def _loss(run: Run | None) -> float:
    return float("nan") if run is None or run.final_loss is None else run.final_loss
