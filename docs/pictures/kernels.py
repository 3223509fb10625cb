"""The pictures of docs/kernels.md, from the package's tables, schedules and plans: python docs/pictures/kernels.py"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from picture import BLUE, FOLDER, GREEN, GREY, INK, LILAC, ORANGE, PALE, RED, bare, new, save

from lowmem_kernels.elementwise.launch import plan_elementwise, plan_tile
from lowmem_kernels.factored import schedule as factored
from lowmem_kernels.factored.fields import PHASES, SLAB
from lowmem_kernels.lowrank.schedule import Kind, tiling_of
from lowmem_kernels.multinorm import NormRule
from lowmem_kernels.multinorm import schedule as multinorm
from lowmem_kernels.projection import schedule as projection
from lowmem_kernels.schedules import Geometry
from lowmem_kernels.table import HEADER, Layout, tables
from lowmem_kernels.tickets import SEGMENT, Order
from lowmem_kernels.whitening.schedule import STATS_ROWS, block_of

#: What the tile pictures are of.
SIDE = 4096
ALIGNED = Layout(aligned=True, strided=False)
COLOURS = (BLUE, ORANGE, GREEN, LILAC, RED)
LIGHT = ("#c9d8ee", "#f5d9c1", "#cfe5d6", "#dfd5ea", "#ecd0d5")


# many tensors in one launch


def table_of(sizes: Sequence[int], tile: int) -> list[list[int]]:
    """First tile, elements and programs of each tensor, from the table that a launch over them would have."""
    params = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
    (table,) = tables([params, params], range(len(sizes)), tile)
    rows = table.values[: table.rows * (HEADER + 2)].reshape(table.rows, -1).tolist()
    ends = [*(row[0] for row in rows[1:]), table.tiles]
    return [[row[0], row[1], end - row[0]] for row, end in zip(rows, ends, strict=True)]


def draw_tables(path: Path, sizes: Sequence[int] = (4704, 64, 4912), tile: int = 2048) -> None:
    """Writes the picture of tensors, programs and the table."""
    figure = new(9, 2.6)
    axes = figure.subplots()
    bare(axes)
    scale, gap, left = 1 / tile, 0.25, 0.0
    for k, (first, numel, programs) in enumerate(table_of(sizes, tile)):
        for program in range(programs):
            width = min(tile, numel - program * tile) * scale
            start = left + program
            axes.add_patch(Rectangle((start, 1), width, 0.5, facecolor=LIGHT[k], edgecolor=COLOURS[k]))
            _text(axes, start + width / 2, 1.75, f"{first + program}", 10)
        axes.add_patch(Rectangle((left, 0.05), 1.25, 0.5, facecolor="white", edgecolor=COLOURS[k]))
        _text(axes, left + 0.62, 0.3, f"{first} | {numel} | ...", 9)
        left += max(programs * 1.0, 1.35) + gap
    for y, label in ((1.75, "programs"), (1.25, "tensors"), (0.3, "table")):
        axes.text(-0.15, y, label, ha="right", va="center", fontsize=9, color=GREY)
    axes.set_title(
        f"Three tensors of {', '.join(map(str, sizes))} elements, {tile} for each program", fontsize=9, color=GREY
    )
    axes.set_xlim(-1, left)
    axes.set_ylim(-0.1, 2)
    save(figure, path)


# tickets


@dataclass(frozen=True)
class Ticket:
    """Whose it is, of which phase, and which of that phase's."""

    owner: int
    phase: str
    index: int


def tickets_of(shapes: Sequence[tuple[int, int]], order: Order) -> list[Ticket]:
    """The list of Adafactor over some matrices, decoded as a program on the device does."""
    geometries = [Geometry(shape, None) for shape in shapes]
    count = len(shapes)
    phases = ("look", "columns", "apply")
    (schedule,) = factored.schedules_of(geometries, [True] * count, range(count), phases, 2, order)
    words = schedule.values[: schedule.segments_start].tolist()
    segments = schedule.values[schedule.segments_start : schedule.rows_start].reshape(-1, len(SEGMENT)).tolist()
    found = []
    for word in words:
        segment = dict(zip(SEGMENT, segments[word >> 32], strict=True))
        found.append(Ticket(segment["owner"], PHASES[segment["phase"]], word & 0xFFFFFFFF))
    return found


#: Two small matrices in one bundle and a larger one in the next, two tickets ahead.
TICKET_SHAPES = ((64, 256), (48, 256), (96, 256))
TICKET_ORDER = Order(bundle_bytes=64 * 1024, ahead=2, reverse=True, phased=False)


def draw_tickets(path: Path) -> None:
    """Writes the picture of a list of tickets, in the order in which programs take them."""
    found = tickets_of(TICKET_SHAPES, TICKET_ORDER)
    figure = new(11, 2.6)
    axes = figure.subplots()
    bare(axes)
    lanes = ("look", "columns", "apply")
    for x, ticket in enumerate(found):
        y = lanes.index(ticket.phase)
        colour, light = COLOURS[ticket.owner], LIGHT[ticket.owner]
        axes.add_patch(Rectangle((x + 0.05, 2 - y + 0.1), 0.9, 0.8, facecolor=light, edgecolor=colour))
        _text(axes, x + 0.5, 2.5 - y, f"{ticket.index}", 7)
    for y, lane in enumerate(lanes):
        axes.text(-0.3, 2.5 - y, lane, ha="right", va="center", fontsize=9, color=GREY)
    for k, (rows, cols) in enumerate(TICKET_SHAPES):
        axes.text(k * 12, -0.55, f"{rows} x {cols}", fontsize=9, color=COLOURS[k], ha="left")
    axes.text(len(found), 3.25, "order in which tickets are taken", fontsize=8, color=GREY, ha="right")
    axes.set_xlim(-4, len(found))
    axes.set_ylim(-0.8, 3.5)
    save(figure, path)


# what one program owns


def _text(axes: Axes, x: float, y: float, text: str, size: float = 8, colour: str = INK) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)


class _Panel:
    """A square that stands for a matrix, with rows downwards."""

    def __init__(self, axes: Axes, title: str, note: str) -> None:
        self.axes = axes
        bare(axes)
        axes.set_aspect("equal")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.28, 1.02)
        axes.set_title(title, fontsize=10, color=INK)
        axes.text(0.5, -0.04, note, ha="center", va="top", fontsize=8, color=GREY)
        self.area(0, 1, 0, 1, "white", INK)

    def area(self, top: float, bottom: float, left: float, right: float, face: str, edge: str, text: str = "") -> None:
        """Rows from top to bottom and columns from left to right, in parts of the square."""
        corner = (left, 1 - bottom)
        self.axes.add_patch(Rectangle(corner, right - left, bottom - top, facecolor=face, edgecolor=edge, linewidth=1))
        if text:
            _text(self.axes, (left + right) / 2, 1 - (top + bottom) / 2, text)

    def rows(self, count: int) -> None:
        """Lines that cut it into as many groups of rows."""
        for i in range(1, count):
            self.axes.plot([0, 1], [i / count, i / count], color=PALE, linewidth=0.8)

    def cols(self, count: int) -> None:
        """Lines that cut it into as many groups of columns."""
        for i in range(1, count):
            self.axes.plot([i / count, i / count], [0, 1], color=PALE, linewidth=0.8)


def numbers() -> dict[str, Any]:
    """What the panels say, from the plans of the families for a 4096 x 4096 matrix in bfloat16 on an H100."""
    geometry = Geometry((SIDE, SIDE), None)
    sinkhorn = multinorm.route_of(geometry, True, NormRule(("row", "col") * 5))
    tile = plan_tile(SIDE * SIDE)
    lowrank = tiling_of(Kind(ALIGNED, resident=False, rank=16))
    wide = factored.tile_of(geometry, ALIGNED)
    return {
        "elementwise": (tile, plan_elementwise(tile, ALIGNED, 32).block, -(-SIDE * SIDE // tile)),
        "factored": (wide.rows, wide.cols, SIDE // wide.rows, SLAB, SIDE // SLAB),
        "multinorm": (sinkhorn.tile.rows, sinkhorn.tile.cols, multinorm.MAX_GROUPS, SIDE // multinorm.MAX_GROUPS),
        "projection": (*projection.DOT_TILE, SIDE // projection.DOT_TILE.rows, projection.MAX_RANKS),
        "whitening": (block_of(SIDE, ALIGNED), SIDE // block_of(SIDE, ALIGNED), STATS_ROWS),
        "lowrank": (lowrank.rows, lowrank.cols, lowrank.span),
    }


def draw_tiles(path: Path) -> None:
    """Writes the picture of what one program of each family owns."""
    figure = new(11, 8.4)
    axes = figure.subplots(2, 3)
    said = numbers()
    for panel, (name, draw) in zip(axes.flat, PANELS.items(), strict=True):
        draw(panel, *said[name])
    figure.suptitle(
        f"A {SIDE} x {SIDE} matrix in bfloat16, planned for an H100; areas are not to scale", fontsize=9, color=GREY
    )
    save(figure, path)


def _elementwise(axes: Axes, tile: int, block: int, programs: int) -> None:
    panel = _Panel(axes, "elementwise", f"{programs} programs of {tile} elements,\nin blocks of {block}")
    panel.rows(8)
    panel.area(3 / 8, 4 / 8, 0, 1, LIGHT[0], BLUE, "one program")
    for i in range(1, 6):
        axes.plot([i / 6, i / 6], [4 / 8, 5 / 8], color=BLUE, linewidth=0.6, linestyle=":")


def _factored(axes: Axes, rows: int, cols: int, groups: int, slab: int, slabs: int) -> None:
    panel = _Panel(
        axes, "factored",
        f"look, apply: {groups} groups of {rows} rows, in tiles of {rows} x {cols}\n"
        f"columns: {slabs} slabs of {slab}, over the sums of all groups",
    )  # fmt: skip
    panel.rows(8)
    panel.area(2 / 8, 3 / 8, 0, 1, LIGHT[0], BLUE)
    panel.area(2 / 8, 3 / 8, 0, 1 / 6, BLUE, BLUE)
    panel.area(0, 1, 0.7, 0.76, LIGHT[1], ORANGE)
    _text(axes, 0.42, 1 - 2.5 / 8, "a ticket of the look")
    _text(axes, 0.42, 0.2, "a ticket of the columns  →", 8)


def _multinorm(axes: Axes, rows: int, cols: int, groups: int, lines: int) -> None:
    panel = _Panel(
        axes, "multinorm",
        f"a read: {groups} groups of {lines} rows, {rows} whole rows\nof {cols} at a time in registers",
    )  # fmt: skip
    panel.rows(8)
    panel.area(2 / 8, 3 / 8, 0, 1, LIGHT[0], BLUE)
    panel.area(2 / 8, 2.25 / 8, 0, 1, BLUE, BLUE)
    panel.area(0, 1, 0.7, 0.76, LIGHT[1], ORANGE)
    _text(axes, 0.35, 1 - 2.65 / 8, "a ticket of a read")
    _text(axes, 0.42, 0.2, "a ticket that closes it  →", 8)


def _projection(axes: Axes, channels: int, depth: int, programs: int, ranks: int) -> None:
    panel = _Panel(
        axes, "projection",
        f"first read: {programs} programs of {channels} channels, times P\n"
        f"in steps of {depth}, for {ranks} ranks; R: {channels} x {ranks}",
    )  # fmt: skip
    panel.rows(8)
    panel.area(2 / 8, 3 / 8, 0, 1, LIGHT[0], BLUE, f"{channels} channels")
    panel.area(2 / 8, 3 / 8, 0, 1 / 8, BLUE, BLUE)
    axes.annotate("", (1.0, 1 - 2.5 / 8), (0.75, 1 - 2.5 / 8), arrowprops={"arrowstyle": "->", "color": BLUE})


def _whitening(axes: Axes, block: int, blocks: int, stats: int) -> None:
    panel = _Panel(
        axes, "whitening",
        f"S = Xᵀ X: tiles of {block} x {block} not above the diagonal,\n"
        f"{blocks * (blocks + 1) // 2} programs; statistics: {stats} rows each",
    )  # fmt: skip
    shown = 8
    for i in range(shown):
        for j in range(i + 1):
            panel.area(i / shown, (i + 1) / shown, j / shown, (j + 1) / shown, LIGHT[2], "white")
    panel.area(5 / shown, 6 / shown, 2 / shown, 3 / shown, GREEN, GREEN)
    panel.area(2 / shown, 3 / shown, 5 / shown, 6 / shown, "white", GREEN)
    _text(axes, 0.72, 0.56, "its mirror image", 8)
    _text(axes, 0.3, 0.2, "one program", 8)


def _lowrank(axes: Axes, rows: int, cols: int, span: int) -> None:
    panel = _Panel(
        axes, "lowrank",
        f"row pass: {rows} rows; column pass: {cols} columns;\nupdate: {rows} rows and {span} columns",
    )  # fmt: skip
    panel.area(1 / 8, 2 / 8, 0, 1, LIGHT[0], BLUE, "row pass: Y = A Rᵀ")
    panel.area(0, 1, 0.85, 0.91, LIGHT[1], ORANGE)
    panel.area(5 / 8, 6 / 8, 0.25, 0.5, LIGHT[2], GREEN)
    _text(axes, 0.375, 0.18, "update", 8)
    _text(axes, 0.55, 0.5, "column pass: B = Qᵀ A  →", 8)


PANELS = {
    "elementwise": _elementwise,
    "factored": _factored,
    "multinorm": _multinorm,
    "projection": _projection,
    "whitening": _whitening,
    "lowrank": _lowrank,
}

#: What this script writes.
PICTURES = {"tables.svg": draw_tables, "tickets.svg": draw_tickets, "tiles.svg": draw_tiles}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, draw in PICTURES.items():
        draw(folder / name)
