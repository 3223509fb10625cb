"""Which parameter is cut into which tickets, and where its scratch lies: a pure function of shapes and strides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..pieces import MAX_GROUPS as PIECE_GROUPS
from ..pieces import Piece, whole_piece
from ..schedules import SMALL_TILES, Geometry, Row, Schedule, Shape, schedule_of, vectors
from ..table import Layout, collapse
from ..tickets import Order, Stage
from .fields import FIELDS, PHASES, SCALARS, SLAB

#: Groups of rows of a parameter at most. A group is one tile's rows while there are no more than this, so 4096 rows are
#: 256 tickets, about one for each of the 264 places that an H100 has at two programs on a processor. Each group has its
#: own column sums, of which a slab's reader has 8 bytes for each column and group, 128 KB. Computed, not measured.
MAX_GROUPS = 512

#: Bytes of column sums of a bundle, unless a single parameter needs more: the scratch has two slots of that size.
SCRATCH_BYTES = 32 * 2**20


#: Tiles of 4096 elements: of 8 warps, each thread has 16 elements, two 16-byte accesses of bfloat16 for each tensor.
WIDE, NARROW = Shape(16, 256), Shape(128, 32)
HALF_WIDE, HALF_NARROW = Shape(8, 256), Shape(64, 32)


@dataclass(frozen=True, eq=False)
class FactoredSchedule(Schedule):
    """Parameters of one launch, in what tiles they are cut, and what may be assumed of them."""

    tile: Shape
    layout: Layout


def schedules_of(
    geometries: Sequence[Geometry],
    aligned: Sequence[bool],
    keys: Sequence[int],
    phases: Sequence[str],
    itemsize: int,
    order: Order,
    pieces: Sequence[Piece | None] | None = None,
) -> tuple[FactoredSchedule, ...]:
    """Return the schedules of a list of parameters: one for each tile and layout that occurs.

    Args:
        geometries: of the parameters.
        aligned: whether all tensors of a parameter that are read in tiles start at multiples of 16 bytes.
        keys: of the parameters' rounding noise.
        phases: of the rule, in order.
        itemsize: bytes of a gradient's element.
        order: of the tickets.
        pieces: what there is to know of parameters in pieces, None for those that have no elements at all; a phase is
            then one launch of all of them.
    """
    kinds: dict[tuple[Shape, Layout], list[int]] = {}
    for i, (geometry, starts_aligned) in enumerate(zip(geometries, aligned, strict=True)):
        if pieces is not None and pieces[i] is None:
            continue
        layout = layout_of(geometry, starts_aligned)
        kinds.setdefault((tile_of(geometry, layout), layout), []).append(i)
    limit = SCRATCH_BYTES if pieces is None else 1 << 62
    # the last phase that needs the partial sums
    frees = PHASES.index("residual_columns" if "residual" in phases else "columns")
    schedules = []
    for (tile, layout), members in kinds.items():
        rows = [_Row(geometries[i], tile, phases, None if pieces is None else pieces[i]) for i in members]
        member_keys = [keys[i] for i in members]
        schedule = schedule_of(members, rows, member_keys, itemsize, frees, order, limit)
        schedules.append(FactoredSchedule(**vars(schedule), tile=tile, layout=layout))
    return tuple(schedules)


def layout_of(geometry: Geometry, aligned: bool) -> Layout:
    """Return what may be assumed of a parameter: 16-byte accesses need rows of whole vectors at aligned addresses."""
    whole = (geometry.shape[-1] if geometry.shape else 1) % 8 == 0
    return Layout(aligned and whole and geometry.strides is None, geometry.strides is not None)


def tile_of(geometry: Geometry, layout: Layout) -> Shape:
    """Return the tile for a parameter: narrow for rows of at most 64 elements, which a wide one would not fill.

    Half as large where elements are accessed one by one, each with an address of its own: then 4 for each thread of 16
    warps do not spill on sm_90, and 8 do.
    """
    shape = geometry.shape
    wide, narrow = (WIDE, NARROW) if layout.aligned else (HALF_WIDE, HALF_NARROW)
    return narrow if len(shape) >= 2 and shape[-1] <= 2 * narrow.cols else wide


class _Row(Row):
    """One parameter of a launch."""

    names = FIELDS

    def __init__(self, geometry: Geometry, tile: Shape, phases: Sequence[str], piece: Piece | None) -> None:
        shape, residual = geometry.shape, "residual" in phases
        numel = torch.Size(shape).numel()
        full = len(shape) < 2 or (numel == 0 and piece is None)
        if full:
            matrices, n, m = 1, -(-numel // tile.cols), tile.cols
            last = numel - (n - 1) * m if n else 0
        else:
            matrices, n, m = prod(shape[:-2]), shape[-2], shape[-1]
            last = m
        whole = whole_piece(n) if piece is None else piece
        blocks = -(-n // tile.rows)
        groups = max(1, min(blocks, (MAX_GROUPS if piece is None else PIECE_GROUPS) // matrices))
        group_rows = max(1, -(-blocks // groups)) * tile.rows
        groups = max(1, -(-n // group_rows))
        tiles = blocks * -(-m // tile.cols)
        batch = max(1, SMALL_TILES // max(tiles, 1)) if groups == 1 and not full else 1
        tickets = -(-matrices // batch) * groups
        slabs = -(-m // SLAB) if batch == 1 and not full else 1
        col_tickets = -(-matrices // batch) * slabs
        sizes = {
            "new_row": 0 if full else matrices * n,
            "new_col": 0 if full else matrices * m,
            "col_scale": 0 if full else matrices * m,
            "row_mean": matrices,
            "row_sum": matrices * groups,
            "row_min": matrices * groups,
            "param_sum": tickets,
            "update_sum": max(tickets, col_tickets),
            "floored": col_tickets,
            "scalars": len(SCALARS),
            "res_row": matrices * n if residual and not full else 0,
            "res_col": matrices * m if residual and not full else 0,
            "res_scale": matrices * m if residual and not full else 0,
            "res_mean": matrices if residual else 0,
        }
        partial = 0 if full else vectors(matrices * groups * 2 * m)
        dims, strides = _strides(geometry, m, full)
        fields = {
            "full": int(full),
            "numel": numel if piece is None else matrices * whole.rows * m,
            "matrices": matrices,
            "n": n,
            "m": m,
            "last": last,
            "group_rows": group_rows,
            "groups": groups,
            "batch": batch,
            "tickets": tickets,
            "slab_tickets": slabs,
            "slab_width": SLAB if slabs > 1 else m,
            "col_tickets": col_tickets,
            "update_sums": 0 if full and not numel else tickets if full else col_tickets,
            "rows": whole.rows,
            "first_row": whole.place.first,
            "run": whole.place.run,
            "distance": whole.place.distance,
            "sums": whole.first_sums,
            "res_sums": whole.second_sums,
            "ndim": len(dims) // 3,
            **strides,
        }
        self._phases, self._full, self._tickets, self._col_tickets = phases, full, tickets, col_tickets
        super().__init__(numel, partial, sizes, fields, dims, {"dims": 0})

    def stages(self) -> list[Stage]:
        """The parameter's share of each phase. Backwards go those that look again at what the one before has read."""
        again = "residual" if "residual" in self._phases else "apply"
        return [
            Stage(PHASES.index(phase), tickets, phase == again)
            for phase in self._phases
            if (tickets := self._tickets_in(phase))
        ]

    def _tickets_in(self, phase: str) -> int:
        if phase in ("columns", "sums", "residual_sums"):
            return self._col_tickets
        if phase == "residual_columns":
            return 0 if self._full else self._col_tickets
        if phase == "floor":
            return 0 if self._full else self._tickets
        return self._tickets


def _strides(geometry: Geometry, m: int, full: bool) -> tuple[list[int], dict[str, int]]:
    """(size, stride of p, stride of g) of the outer dimensions, innermost first, and the last two's strides."""
    names = ("param_row_stride", "param_col_stride", "grad_row_stride", "grad_col_stride")
    if geometry.strides is None:
        return [], dict.fromkeys(names, 0)
    shape, (param, grad) = geometry.shape, geometry.strides
    if full:
        # one dimension, cut into rows of m; an empty one has nothing to walk
        p, g = (param[-1], grad[-1]) if len(shape) == 1 else (0, 0)
        return [], dict(zip(names, (p * m, p, g * m, g), strict=True))
    dims = [number for extent in reversed(collapse(shape[:-2], param[:-2], grad[:-2])) for number in extent]
    return dims, dict(zip(names, (*param[-2:], *grad[-2:]), strict=True))
