"""Which parameter is cut into which tickets, and where its scratch lies: a pure function of shapes and strides.

How a parameter is cut, and so the order of its sums, depends on its own shape only, never on what else is in the list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..table import Layout, collapse
from .fields import FIELDS, PHASES, SCALARS, SEGMENT, SLAB

#: Groups of rows of a parameter at most. Each has its own column sums, 8 bytes for each column, which cost more the
#: more groups there are: at 128 and 4096 rows, 0.25 bytes for each element. Fewer would leave processors idle where
#: one matrix is all there is (132 on an H100). Computed, not measured.
MAX_GROUPS = 128

#: Tiles that a ticket of small matrices has at most, so that a stack of thousands (convolutions) has not as many
#: programs, each of which does nothing but find its place.
SMALL_TILES = 16

#: Bytes of scratch of one launch, but for a single parameter that needs more: longer lists are worked off in parts.
SCRATCH_BYTES = 64 * 2**20


class Shape(NamedTuple):
    """A tile's rows and columns."""

    rows: int
    cols: int


#: Tiles of 4096 elements: of 8 warps, each thread has 16 elements, two 16-byte accesses of bfloat16 for each tensor.
WIDE, NARROW = Shape(16, 256), Shape(128, 32)
HALF_WIDE, HALF_NARROW = Shape(8, 256), Shape(64, 32)


class Geometry(NamedTuple):
    """What the schedule depends on: a parameter's shape, and where it or its gradient is not contiguous the strides."""

    shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], tuple[int, ...]] | None


@dataclass(frozen=True)
class Launch:
    """The tickets of one phase: a range of the ticket list and of its segments."""

    phase: str
    ticket: int
    tickets: int
    segment: int
    segments: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """Parameters that are worked off together: which of the list, in what tiles, and what may be assumed of them.

    ``values`` is the table for the kernels, whose rows start at ``rows_start``; ``launches`` are its phases;
    ``scratch`` counts float32 elements.
    """

    members: tuple[int, ...]
    tile: Shape
    layout: Layout
    values: tuple[int, ...]
    rows_start: int
    launches: tuple[Launch, ...]
    scratch: int


def geometry_of(param: Tensor, grad: Tensor) -> Geometry:
    """Return the geometry of a parameter and its gradient."""
    contiguous = param.is_contiguous() and grad.is_contiguous()
    return Geometry(tuple(param.shape), None if contiguous else (param.stride(), grad.stride()))


def schedules_of(
    geometries: Sequence[Geometry], aligned: Sequence[bool], keys: Sequence[int], phases: Sequence[str]
) -> tuple[Schedule, ...]:
    """Return the schedules of a list of parameters: one for each tile and layout, and for each part of those.

    Args:
        geometries: of the parameters.
        aligned: whether all tensors of a parameter that are read in tiles start at multiples of 16 bytes.
        keys: of the parameters' rounding noise.
        phases: of the rule, in order.
    """
    kinds: dict[tuple[Shape, Layout], list[int]] = {}
    for i, (geometry, starts_aligned) in enumerate(zip(geometries, aligned, strict=True)):
        layout = layout_of(geometry, starts_aligned)
        kinds.setdefault((tile_of(geometry, layout), layout), []).append(i)
    schedules = []
    for (tile, layout), members in kinds.items():
        rows = [_Row(geometries[i], tile, "residual" in phases) for i in members]
        for part in _parts(rows):
            chosen = tuple(members[part.start : part.stop])
            schedules.append(
                _schedule(chosen, tile, layout, rows[part.start : part.stop], [keys[i] for i in chosen], phases)
            )
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


def _parts(rows: Sequence[_Row]) -> Iterator[range]:
    """Cut a list into ranges whose scratch is at most SCRATCH_BYTES, or that have one parameter."""
    start, size = 0, 0
    for i, row in enumerate(rows):
        if i > start and size + 4 * row.scratch > SCRATCH_BYTES:
            yield range(start, i)
            start, size = i, 0
        size += 4 * row.scratch
    yield range(start, len(rows))


def _schedule(
    members: tuple[int, ...],
    tile: Shape,
    layout: Layout,
    rows: Sequence[_Row],
    keys: Sequence[int],
    phases: Sequence[str],
) -> Schedule:
    """Phases one after the other, each through all parameters."""
    segments: list[int] = []
    launches = []
    ticket = 0
    for phase in phases:
        first_ticket, first_segment = ticket, len(segments) // SEGMENT
        for k, row in enumerate(rows):
            if count := row.tickets_in(phase):
                segments += (ticket, k, PHASES.index(phase))
                ticket += count
        here = len(segments) // SEGMENT - first_segment
        if here:
            launches.append(Launch(phase, first_ticket, ticket - first_ticket, first_segment, here))
    rows_start = len(segments)
    dims_start = rows_start + len(rows) * len(FIELDS)
    values, dims = segments, list[int]()
    scratch = 0
    for row, key in zip(rows, keys, strict=True):
        values += row.values(key, scratch, dims_start + len(dims))
        dims += row.dims
        scratch += row.scratch
    return Schedule(members, tile, layout, tuple(values + dims), rows_start, tuple(launches), scratch)


class _Row:
    """One parameter's fields."""

    def __init__(self, geometry: Geometry, tile: Shape, residual: bool) -> None:
        shape = geometry.shape
        numel = torch.Size(shape).numel()
        full = len(shape) < 2 or numel == 0
        if full:
            matrices, n, m = 1, -(-numel // tile.cols), tile.cols
            last = numel - (n - 1) * m if n else 0
        else:
            matrices, n, m = numel // (shape[-2] * shape[-1]), shape[-2], shape[-1]
            last = m
        blocks = -(-n // tile.rows)
        groups = max(1, min(blocks, MAX_GROUPS // matrices))
        group_rows = max(1, -(-blocks // groups)) * tile.rows
        groups = max(1, -(-n // group_rows))
        tiles = blocks * -(-m // tile.cols)
        batch = max(1, SMALL_TILES // tiles) if groups == 1 and not full else 1
        tickets = -(-matrices // batch) * groups
        slabs = -(-m // SLAB) if batch == 1 and not full else 1
        col_tickets = -(-matrices // batch) * slabs
        sizes = {
            "new_row": 0 if full else matrices * n,
            "new_col": 0 if full else matrices * m,
            "row_mean": matrices,
            "partial": 0 if full else matrices * groups * 2 * m,
            "row_sum": matrices * groups,
            "row_min": matrices * groups,
            "param_sum": tickets,
            "update_sum": max(tickets, col_tickets),
            "floored": col_tickets,
            "scalars": len(SCALARS),
            "res_row": matrices * n if residual and not full else 0,
            "res_col": matrices * m if residual and not full else 0,
            "res_mean": matrices if residual else 0,
        }
        self.full = full
        self._offsets, self.scratch = {}, 0
        for name, size in sizes.items():
            self._offsets[name] = self.scratch
            # vectors start at a multiple of 16 bytes
            self.scratch += -(-size // 4) * 4
        self.dims, strides = _strides(geometry, m, full)
        self._fields = {
            "full": int(full),
            "numel": numel,
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
            "update_sums": (tickets if full else col_tickets) if numel else 0,
            "ndim": len(self.dims) // 3,
            **strides,
        }

    def tickets_in(self, phase: str) -> int:
        """How many tickets the parameter has in a phase."""
        if phase == "columns":
            return self._fields["col_tickets"]
        if phase == "residual_columns":
            return 0 if self.full else self._fields["col_tickets"]
        if phase == "floor":
            return 0 if self.full else self._fields["tickets"]
        return self._fields["tickets"]

    def values(self, key: int, scratch: int, dims: int) -> list[int]:
        """The row, with its scratch and dimensions starting at these places."""
        offsets = {name: scratch + offset for name, offset in self._offsets.items()}
        fields = {"key": key, "dims": dims, **self._fields, **offsets}
        return [fields[name] for name in FIELDS]


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
