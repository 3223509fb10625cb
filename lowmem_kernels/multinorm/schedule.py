"""Which way a parameter is looked at, in what tiles, where its scratch lies: pure functions of shapes and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..lines import cut_lines, is_transposed, line_dims, matrix_shape
from ..pieces import MAX_GROUPS as PIECE_GROUPS
from ..pieces import Piece, whole_piece
from ..schedules import Geometry, Row, Schedule, Shape, schedule_of, vectors
from ..table import Layout
from ..tickets import Order, Stage
from .fields import FIELDS, SLAB
from .rule import NormRule, Sweep, keeps_elements, sweeps_of

#: Groups of lines of a parameter at most. Each has its own sums over lines, 4 bytes for each place, written once in a
#: read and added up once: 0.5 bytes for each element of a 4096 x 4096 matrix, all in the L2 cache. 256 groups are about
#: one for each of the 264 places that an H100 has at two programs on a processor. Computed, not measured.
MAX_GROUPS = 256

#: Bytes of such sums of a bundle, unless a single parameter needs more: the scratch has two slots of that size.
SCRATCH_BYTES = 32 * 2**20

#: Elements of a tile that holds whole lines: 32 for each thread of 8 warps, which takes 128 registers with the sums and
#: scales of its places. Where elements are accessed one by one, with an address for each, 4 for each thread of 16.
RESIDENT_ELEMENTS, RAGGED_ELEMENTS = 8192, 2048

#: Lines side by side in a tile of lines that do not lie in one piece: at least 32 bytes of bfloat16, a memory sector.
ACROSS = 16

#: Longest line that a program holds: 16 warps have 32 elements each thread.
LONGEST = 16384

#: Tiles of longer lines, which are read twice. Of few lines, so that they are still in a cache the second time: 264
#: programs hold 60 MB of rows of 28672 bfloat16.
LONG_TILE, LONG_RAGGED_TILE = Shape(4, 1024), Shape(2, 1024)

#: Tiles of the last read where it need not hold whole lines; of lines of at most 64 elements; of lines that do not lie
#: in one piece; and the halves where elements are accessed one by one.
APPLY_TILE, NARROW_APPLY_TILE, CROSS_APPLY_TILE = Shape(16, 256), Shape(64, 64), Shape(64, 64)
RAGGED_APPLY_TILE, NARROW_RAGGED_APPLY_TILE = Shape(8, 256), Shape(32, 64)


class Route(NamedTuple):
    """How a parameter is looked at; parameters that share it go into one launch.

    layout: what may be assumed of its tensors.
    rows: whether lines are rows (else columns), contiguous: whether they lie in one piece.
    tile: of the reads; resident: whether it has whole lines; whole: whether it has the whole matrix, and reads it once.
    apply_tile: of the last read.
    """

    layout: Layout
    rows: bool
    contiguous: bool
    tile: Shape
    resident: bool
    apply_tile: Shape
    whole: bool = False


@dataclass(frozen=True, eq=False)
class MultinormSchedule(Schedule):
    """Parameters of one launch, and how they are looked at."""

    route: Route


def route_of(geometry: Geometry, aligned: bool, rule: NormRule, writes: bool = True) -> Route:
    """Return how a parameter is looked at: as a whole, if it is a single matrix that fits into a tile.

    Lines are what lies in one piece: the rows, or the columns of a matrix that is transposed in memory. Lines across
    are taken where they are short enough (512 elements) that a tile of whole ones has 16 side by side, and save a read,
    or the others are too long to be held.
    """
    route = _route_of_lines(geometry, aligned, rule, by_rows=bool(rule.row_threshold))
    matrices, n, m = matrix_shape(geometry.shape, rule.conv)
    lines, length = (n, m) if route.rows else (m, n)
    tile = Shape(1 << max(lines - 1, 0).bit_length(), _power(length))
    fits = matrices == 1 and math.prod(tile) <= (RESIDENT_ELEMENTS if route.layout.aligned else RAGGED_ELEMENTS)
    if fits and writes and not keeps_elements(rule) and route.contiguous:
        return route._replace(tile=tile, resident=True, apply_tile=tile, whole=True)
    return route


def _route_of_lines(geometry: Geometry, aligned: bool, rule: NormRule, by_rows: bool) -> Route:
    _, n, m = matrix_shape(geometry.shape, rule.conv)
    transposed = is_transposed(geometry, rule.conv)
    if geometry.strides is not None and not transposed:
        return _route(Layout(False, True), True, True, m, rule)
    along, across = (n, m) if transposed else (m, n)
    layout = Layout(aligned and along % 8 == 0, False)
    if by_rows:
        # for a threshold the norms of rows have to be known before anything else, which is provided for lines only
        return _route(Layout(layout.aligned and not transposed, False), True, not transposed, m, rule)
    better = _reads(rule, transposed) < _reads(rule, not transposed) or _power(along) > LONGEST
    if better and layout.aligned and RESIDENT_ELEMENTS // _power(across) >= ACROSS:
        return _route(layout, transposed, False, across, rule)
    return _route(layout, not transposed, True, along, rule)


def _route(layout: Layout, rows: bool, contiguous: bool, length: int, rule: NormRule) -> Route:
    width, elements = _power(length), RESIDENT_ELEMENTS if layout.aligned else RAGGED_ELEMENTS
    resident = width <= (LONGEST if layout.aligned else RAGGED_ELEMENTS)
    if resident:
        tile = Shape(max(1, elements // width), width)
    else:
        tile = LONG_TILE if layout.aligned else LONG_RAGGED_TILE
    _, last_line = sweeps_of(rule, "row" if rows else "col")
    narrow = width <= 64
    if last_line:
        apply_tile = tile
    elif layout.aligned:
        apply_tile = CROSS_APPLY_TILE if not contiguous else NARROW_APPLY_TILE if narrow else APPLY_TILE
    else:
        apply_tile = NARROW_RAGGED_APPLY_TILE if narrow else RAGGED_APPLY_TILE
    return Route(layout, rows, contiguous, tile, resident, apply_tile)


def _power(length: int) -> int:
    """The width of a tile that holds a line."""
    return max(32, 1 << max(length - 1, 0).bit_length())


def _reads(rule: NormRule, rows: bool) -> int:
    return len(sweeps_of(rule, "row" if rows else "col")[0])


def schedules_of(
    geometries: Sequence[Geometry],
    aligned: Sequence[bool],
    keys: Sequence[int],
    rule: NormRule,
    writes: bool,
    itemsize: int,
    order: Order,
    pieces: Sequence[Piece | None] | None = None,
) -> tuple[MultinormSchedule, ...]:
    """Return the schedules of a list of parameters: one for each route that occurs.

    Args:
        geometries: of the parameters.
        aligned: whether all tensors of a parameter that are read in tiles start at multiples of 16 bytes.
        keys: of the parameters' rounding noise.
        rule: of which norms matter.
        writes: whether parameters are written, or only scales, which takes no matrix as a whole.
        itemsize: bytes of a gradient's element.
        order: of the tickets.
        pieces: what there is to know of parameters in pieces, None for those that have no elements at all; a phase is
            then one launch of all of them.
    """
    kinds: dict[Route, list[int]] = {}
    for i, (geometry, starts_aligned) in enumerate(zip(geometries, aligned, strict=True)):
        if pieces is None:
            kinds.setdefault(route_of(geometry, starts_aligned, rule, writes), []).append(i)
        elif pieces[i] is not None:
            # rows are what is whole in a process
            kinds.setdefault(_route_of_lines(geometry, starts_aligned, rule, by_rows=True), []).append(i)
    limit = SCRATCH_BYTES if pieces is None else 1 << 62
    schedules = []
    for route, members in kinds.items():
        sweeps = () if route.whole else sweeps_of(rule, "row" if route.rows else "col")[0]
        rows = [_Row(geometries[i], route, sweeps, rule.conv, None if pieces is None else pieces[i]) for i in members]
        # without sweeps nothing waits for anything, shared scratch included
        bundling = order if sweeps else replace(order, bundle_bytes=1 << 62)
        frees = max(0, 2 * len(sweeps) - 1)
        member_keys = [keys[i] for i in members]
        schedule = schedule_of(members, rows, member_keys, itemsize, frees, bundling, limit)
        schedules.append(MultinormSchedule(**vars(schedule), route=route))
    return tuple(schedules)


class _Row(Row):
    """One parameter of a launch."""

    names = FIELDS

    def __init__(
        self, geometry: Geometry, route: Route, sweeps: Sequence[Sweep], conv: bool, piece: Piece | None
    ) -> None:
        matrices, n, m = matrix_shape(geometry.shape, conv)
        lines, length = (n, m) if route.rows else (m, n)
        numel = matrices * lines * length
        if not numel and piece is None:
            matrices, lines = 1, 0
        whole = whole_piece(lines) if piece is None else piece
        cut = cut_lines(matrices, lines, length, route.tile, MAX_GROUPS if piece is None else PIECE_GROUPS)
        shares = cut.tickets // cut.groups
        slabs = max(1, -(-length // SLAB)) if cut.batch == 1 else 1
        self._tickets = cut.tickets
        self._closing = [shares * slabs if sweep.sums == "cross" else shares for sweep in sweeps]
        sums = {sweep.sums for sweep in sweeps}
        sizes = {
            "line_scale": matrices * lines,
            "cross_scale": matrices * length,
            "group_sum": matrices * cut.groups if sums & {"norms", "total"} else 0,
            "line_norm": matrices * lines if "norms" in sums else 0,
            "threshold": matrices if "norms" in sums else 0,
            "factor": matrices if "total" in sums else 0,
            "probe": max([0, *self._closing]),
            "ok": 1,
        }
        partial = vectors(matrices * cut.groups * length) if "cross" in sums else 0
        dims, starts, counts = line_dims(geometry, route.rows, conv)
        fields = {
            "matrices": matrices,
            "lines": lines,
            "length": length,
            "group_lines": cut.group_lines,
            "groups": cut.groups,
            "batch": cut.batch,
            "slab_tickets": slabs,
            "slab_width": SLAB if slabs > 1 else max(length, 1),
            "closing_tickets": self._closing[-1] if sweeps else 0,
            "whole_lines": whole.rows,
            "first_line": whole.place.first,
            "run": whole.place.run,
            "distance": whole.place.distance,
            "cross_sums": whole.first_sums,
            "single_sums": whole.second_sums,
            **counts,
        }
        super().__init__(numel, partial, sizes, fields, dims, starts)

    def stages(self) -> list[Stage]:
        """Reads and what closes them. Every other read goes backwards: it begins with what was read last."""
        stages = []
        for k, closing in enumerate(self._closing):
            stages += [Stage(2 * k, self._tickets, k % 2 == 1), Stage(2 * k + 1, closing, False)]
        return [*stages, Stage(2 * len(self._closing), self._tickets, len(self._closing) % 2 == 1)]
