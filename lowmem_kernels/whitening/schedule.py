"""Which matrices there are and how they are grouped: a pure function of shapes and strides.

How a matrix is cut into tiles, and so the order of its sums, depends on its own shape only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from ..schedules import Geometry
from ..table import Layout, offsets_of
from .solver import BUFFERS

#: What a kernel reads of each matrix: a row of int64.
FIELDS = (
    "owner",  # its parameter's row of addresses
    "key",  # tensor_key of the rounding noise
    "m",
    "n",
    "start",  # logical index of its first element in the parameter
    "first_row",  # where its row statistics start
    "stats_tile",  # its first tile of row statistics, of all in the table
    "apply_tile",  # its first tile of the update
    # elements from the parameter's (gradient's) address to the matrix, and from row to row
    "param_offset",
    "grad_offset",
    "param_row_stride",
    "grad_row_stride",
    # where in the table the offsets of its columns start, if something is not contiguous
    "param_columns",
    "grad_columns",
)

#: Addresses of a parameter's tensors; 0 where there is none.
COLUMNS = ("param", "grad", "step")

#: Bytes of the K x K matrices that are alive at a time, unless a single problem needs more: one of K = 4096 takes
#: 335 MB, and of K = 768 there are 22. That is enough to fill a GPU with small ones, and little beside the
#: gradients of a model whose matrices are large.
WORKSPACE_BYTES = 256 * 2**20

#: Rows of a tile of row statistics, and columns that it has at a time: 16 elements for each thread of four warps.
STATS_ROWS, STATS_COLS = 8, 256


class Matrix(NamedTuple):
    """One matrix: its parameter, shape, logical start, and offset, row stride and column extents of (p, g)."""

    parameter: int
    m: int
    n: int
    start: int
    offsets: tuple[int, int]
    row_strides: tuple[int, int]
    columns: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None

    @property
    def right(self) -> bool:
        """Whether X^T X is the smaller Gram matrix. Square ones count too: centred rows are in its null space only."""
        return self.m >= self.n

    @property
    def size(self) -> int:
        """K, the rows of the Gram matrix."""
        return min(self.m, self.n)


@dataclass(frozen=True)
class Group:
    """Matrices ``first .. first + count - 1`` of a table, whose K x K problems are solved together.

    ``block`` is the side of the tiles of their Gram matrices and of their updates; the latter are ``apply_tiles``.
    """

    right: bool
    size: int
    first: int
    count: int
    block: int
    apply_tiles: range


@dataclass(frozen=True, eq=False)
class Schedule:
    """Parameters of one layout: which of the list, and the table: rows of FIELDS, then offsets of columns."""

    layout: Layout
    members: np.ndarray
    values: np.ndarray
    matrices: int
    rows: int
    stats_tiles: int
    groups: tuple[Group, ...]


def block_of(size: int, layout: Layout) -> int:
    """Return the side of the tiles of matrices with Gram matrices of ``size``.

    64 as long as 128 would cut a Gram matrix into 10 tiles or fewer, too few for a GPU; and where elements are accessed
    one by one, each with an address of its own, so that 128 would spill on sm_90. Computed, not measured.
    """
    return 128 if size > 512 and layout.aligned else 64


def group_size(size: int) -> int:
    """Return how many Gram matrices of ``size`` are solved together."""
    return max(1, WORKSPACE_BYTES // (4 * BUFFERS * size * size))


def schedules_of(
    geometries: Sequence[Geometry], aligned: Sequence[bool], keys: Sequence[int], conv: bool
) -> tuple[Schedule, ...]:
    """Return the schedules of a list of parameters: one for each layout that occurs.

    Args:
        geometries: of the parameters.
        aligned: whether parameter and gradient start at multiples of 16 bytes.
        keys: of the parameters' rounding noise.
        conv: whether all dimensions but the first are columns.
    """
    kinds: dict[Layout, list[int]] = {}
    for i, (geometry, starts_aligned) in enumerate(zip(geometries, aligned, strict=True)):
        kinds.setdefault(_layout_of(geometry, starts_aligned, conv), []).append(i)
    return tuple([_schedule(layout, members, geometries, keys, conv) for layout, members in kinds.items()])


def _layout_of(geometry: Geometry, aligned: bool, conv: bool) -> Layout:
    """What may be assumed of a parameter: 16-byte accesses need rows of whole vectors at aligned addresses."""
    whole = (prod(geometry.shape[1:]) if conv else geometry.shape[-1]) % 8 == 0
    return Layout(aligned and whole and geometry.strides is None, geometry.strides is not None)


def _schedule(
    layout: Layout, members: list[int], geometries: Sequence[Geometry], keys: Sequence[int], conv: bool
) -> Schedule:
    # equal problems beside each other; sorting is stable, so those of one parameter stay in order
    found = [matrix for i in members for matrix in _matrices(i, geometries[i], conv)]
    found.sort(key=lambda matrix: (matrix.right, matrix.size))
    owners = {parameter: owner for owner, parameter in enumerate(members)}
    columns: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    offsets: list[np.ndarray] = []
    values, first_row, stats_tile, apply_tiles = [], 0, 0, [0]
    for matrix in found:
        places = [0, 0]
        if matrix.columns is not None:
            shape, *strides = matrix.columns
            for operand, steps in enumerate(strides):
                if (shape, steps) not in columns:
                    columns[shape, steps] = len(found) * len(FIELDS) + sum(map(len, offsets))
                    offsets.append(offsets_of(shape, steps))
                places[operand] = columns[shape, steps]
        where = (first_row, stats_tile, apply_tiles[-1])
        ids = (owners[matrix.parameter], keys[matrix.parameter])
        values.append([*ids, matrix.m, matrix.n, matrix.start, *where, *matrix.offsets, *matrix.row_strides, *places])
        first_row += matrix.m
        stats_tile += -(-matrix.m // STATS_ROWS)
        block = block_of(matrix.size, layout)
        apply_tiles.append(apply_tiles[-1] + -(-matrix.m // block) * -(-matrix.n // block))
    return Schedule(
        layout, np.array(members), np.concatenate([np.array(values, dtype=np.int64).ravel(), *offsets]),
        len(found), first_row, stats_tile, tuple(_groups(found, layout, apply_tiles)),
    )  # fmt: skip


def _groups(found: Sequence[Matrix], layout: Layout, apply_tiles: Sequence[int]) -> Iterator[Group]:
    first = 0
    while first < len(found):
        right, size = found[first].right, found[first].size
        end = first + 1
        while end < min(len(found), first + group_size(size)) and (found[end].right, found[end].size) == (right, size):
            end += 1
        tiles = range(apply_tiles[first], apply_tiles[end])
        yield Group(right, size, first, end - first, block_of(size, layout), tiles)
        first = end


def _matrices(parameter: int, geometry: Geometry, conv: bool) -> Iterator[Matrix]:
    shape = geometry.shape
    if prod(shape) == 0:
        return
    outer = 0 if conv else len(shape) - 2
    m, n = shape[outer], prod(shape[outer + 1 :])
    lead = [np.zeros(1, dtype=np.int64)] * 2
    row_strides, columns = (n, n), None
    if geometry.strides is not None:
        p, g = geometry.strides
        lead = [offsets_of(shape[:outer], strides[:outer]) for strides in (p, g)]
        row_strides = (p[outer], g[outer])
        columns = (shape[outer + 1 :], p[outer + 1 :], g[outer + 1 :])
    for e in range(prod(shape[:outer])):
        offsets = (e * m * n,) * 2 if columns is None else (int(lead[0][e]), int(lead[1][e]))
        yield Matrix(parameter, m, n, e * m * n, offsets, row_strides, columns)
