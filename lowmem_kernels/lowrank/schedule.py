"""Which matrices there are and how they are cut: a pure function of shapes, strides and the forms of the moments.

How a matrix is cut, and so the order of its sums, depends on itself only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..schedules import Geometry
from ..table import Layout, collapse, offsets_of
from .checks import Form, matrix_shape

#: What a kernel reads of each matrix: a row of int64.
FIELDS = (
    "owner",  # its parameter's row of addresses
    "key",  # tensor_key of the rounding noise
    "m",
    "n",
    "start",  # logical index of its first element in the parameter
    # its first sum of rows, sum of columns, block of rows, block of columns, tile of the update, of all in the table
    "first_row",
    "first_col",
    "row_block",
    "col_block",
    "tile",
    # of its parameter: the first tile, how many there are, elements
    "owner_tile",
    "owner_tiles",
    "numel",
    # elements from the parameter's (gradient's) address to the matrix, and from row to row
    "param_offset",
    "grad_offset",
    "param_row_stride",
    "grad_row_stride",
    # where in the table the offsets of its rows and columns start, if strides are not enough
    "param_rows",
    "grad_rows",
    "param_cols",
    "grad_cols",
    # of the factors: rank, where they start in the parameter's, and in the scratch
    "rank",
    "left",
    "right",
    "left_scratch",
    "right_scratch",
    # rows (columns) of a group of v, and the first group
    "row_group",
    "row_entry",
    "col_group",
    "col_entry",
)

#: Addresses of a parameter's tensors; 0 where there is none.
COLUMNS = ("param", "grad", "step", "exp_avg", "left", "right", "exp_avg_sq", "row_sq", "col_sq")

#: Smallest rank that a product of tiles is made for.
LEAST_RANK = 16


class Tiling(NamedTuple):
    """Rows of a block of rows, columns of a block of columns, and columns of a tile of the update."""

    rows: int
    cols: int
    span: int


class Moments(NamedTuple):
    """Of one parameter: the rank of its factors, entries of its v of rows and of columns; 0 where there are none."""

    rank: int
    rows: int
    cols: int


class Kind(NamedTuple):
    """What a compiled kernel may assume of all matrices of a schedule.

    resident: each row has a v of its own, so that a program that has whole rows needs no other's sums.
    rank: what all ranks are padded to; 0 without factors.
    """

    layout: Layout
    resident: bool
    rank: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """Parameters of one kind: which of the list, and the table: rows of FIELDS, then offsets of rows and columns.

    rows, cols: of all matrices together. row_blocks, col_blocks, tiles: programs of the launches over them.
    left, right: elements of all factors.
    """

    kind: Kind
    members: np.ndarray
    values: np.ndarray
    matrices: int
    rows: int
    cols: int
    row_blocks: int
    col_blocks: int
    tiles: int
    left: int
    right: int


class Place(NamedTuple):
    """Where one operand of a parameter lies: its row stride, or the offsets of all rows and of all columns."""

    stride: int
    rows: np.ndarray | None
    cols: np.ndarray | None


def tiling_of(kind: Kind) -> Tiling:
    """Return how matrices of a kind are cut.

    With factors a tile is 64 x 32, of which 8 warps of sm_90 need 128 registers for rank 16; 64 x 64 take 224. Without,
    8 rows of 256: each thread of 4 warps has 16 elements, of which 8 beside each other are one 16-byte access of
    bfloat16. Where elements are accessed one by one an address goes with each, so there are 64 columns. Computed, not
    measured.
    """
    if kind.rank:
        return Tiling(64, 32, 1024)
    return Tiling(8, 256 if kind.layout.aligned else 64, 1024)


def padded_rank(rank: int) -> int:
    """Return the power of two, at least LEAST_RANK, that a rank is padded to."""
    return max(LEAST_RANK, 1 << (rank - 1).bit_length()) if rank else LEAST_RANK


def schedules_of(
    geometries: Sequence[Geometry],
    moments: Sequence[Moments],
    aligned: Sequence[bool],
    keys: Sequence[int],
    form: Form,
) -> tuple[Schedule, ...]:
    """Return the schedules of a list of parameters: one for each kind that occurs.

    Args:
        geometries: of the parameters.
        moments: of the parameters.
        aligned: whether parameter, gradient and states start at multiples of 16 bytes.
        keys: of the parameters' rounding noise.
        form: of the moments of all.
    """
    kinds: dict[Kind, list[int]] = {}
    for i, geometry in enumerate(geometries):
        stack, m, n = matrix_shape(geometry.shape, form.by_matrix)
        places = _places(geometry)
        strided = any(place.rows is not None for place in places)
        whole = not strided and n % 8 == 0 and all(place.stride % 8 == 0 for place in places)
        resident = form.second == "rows" and form.momentum != "lowrank" and moments[i].rows == stack * m
        rank = padded_rank(moments[i].rank) if form.momentum == "lowrank" else 0
        kind = Kind(Layout(aligned[i] and whole, strided), resident, rank)
        kinds.setdefault(kind, []).append(i)
    return tuple([_schedule(kind, members, geometries, moments, keys, form) for kind, members in kinds.items()])


def _schedule(
    kind: Kind,
    members: list[int],
    geometries: Sequence[Geometry],
    moments: Sequence[Moments],
    keys: Sequence[int],
    form: Form,
) -> Schedule:
    tiling = tiling_of(kind)
    shapes = [matrix_shape(geometries[i].shape, form.by_matrix) for i in members]
    # the offsets of rows and columns come after the rows of all matrices; an empty parameter has a row as well
    start_of_offsets = sum(max(stack, 1) for stack, _, _ in shapes) * len(FIELDS)
    offsets: list[np.ndarray] = []
    values = []
    row = col = row_block = col_block = tile = left = right = 0
    for owner, (i, (stack, m, n)) in enumerate(zip(members, shapes, strict=True)):
        rank, row_entries, col_entries = moments[i]
        if stack == 0:
            stack, m, n = 1, 0, 0
        places = _places(geometries[i])
        starts = []
        for offset in (places[0].rows, places[1].rows, places[0].cols, places[1].cols):
            starts.append(start_of_offsets + sum(map(len, offsets)))
            offsets += [] if offset is None else [offset]
        row_blocks = -(-m // tiling.rows)
        col_blocks = -(-n // tiling.cols)
        # at least one tile, whose program advances the step
        tiles = max(row_blocks, 1) * (1 if kind.resident else max(-(-n // tiling.span), 1))
        first_tile = tile
        row_group = max(stack * m // row_entries, 1) if row_entries else 1
        col_group = max(stack * n // col_entries, 1) if col_entries else 1
        for e in range(stack):
            strided = places[0].rows is not None
            matrix_offsets = [0, 0] if strided else [e * m * place.stride for place in places]
            values.append(
                [
                    *(owner, keys[i], m, n, e * m * n, row, col, row_block, col_block, tile),
                    *(first_tile, stack * tiles, prod(geometries[i].shape)),
                    *(*matrix_offsets, places[0].stride, places[1].stride),
                    *(starts[0] + e * m, starts[1] + e * m, starts[2], starts[3]),
                    *(rank, e * m * rank, e * rank * n, left, right),
                    *(row_group, e * m // row_group, col_group, e * n // col_group),
                ]
            )
            row, col, row_block, col_block = row + m, col + n, row_block + row_blocks, col_block + col_blocks
            tile, left, right = tile + tiles, left + m * rank, right + rank * n
    return Schedule(
        kind, np.array(members), np.concatenate([np.array(values, dtype=np.int64).ravel(), *offsets]),
        len(values), row, col, row_block, col_block, tile, left, right,
    )  # fmt: skip


def _places(geometry: Geometry) -> tuple[Place, Place]:
    """Where parameter and gradient lie, of which all dimensions but the last are rows."""
    shape = geometry.shape if len(geometry.shape) >= 2 else (1, prod(geometry.shape))
    if geometry.strides is None:
        return Place(shape[-1], None, None), Place(shape[-1], None, None)
    strides = [s if len(geometry.shape) >= 2 else (0, *(s or (1,))) for s in geometry.strides]
    rows = collapse(shape[:-1], *(s[:-1] for s in strides))
    if len(rows) <= 1 and (shape[-1] == 1 or all(s[-1] == 1 for s in strides)):
        steps = rows[0][1:] if rows else (shape[-1],) * 2
        return Place(steps[0], None, None), Place(steps[1], None, None)
    first, second = (Place(0, offsets_of(shape[:-1], s[:-1]), offsets_of(shape[-1:], s[-1:])) for s in strides)
    return first, second


def moments_of(
    params: Sequence[Tensor],
    rights: Sequence[Tensor] | None,
    row_sqs: Sequence[Tensor] | None,
    col_sqs: Sequence[Tensor] | None,
) -> tuple[Moments, ...]:
    """Return the moments of parameters, from the shapes of their states."""
    nothing = [None] * len(params)
    return tuple(
        [
            Moments(*(0 if right is None else right.shape[-2], *(0 if s is None else s.numel() for s in sqs)))
            for right, *sqs in zip(rights or nothing, row_sqs or nothing, col_sqs or nothing, strict=True)
        ]
    )
