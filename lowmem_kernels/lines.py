"""Parameters as stacks of matrices, and matrices as lines: what the families that look at whole lines share.

A *line* is a row of a matrix, or a column; an element's *place* in its line is the number of the column, or of the row.
The device's part is in line_fragments.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .schedules import SMALL_TILES, Geometry, Shape
from .table import collapse

#: The first fields of a parameter's row in the table of a family that works on lines. A parameter is a stack of
#: ``matrices``; a ticket is one of ``groups`` of ``group_lines`` lines, or ``batch`` whole matrices where they are
#: small.
LINE_FIELDS = (
    "key",  # tensor_key of the rounding noise
    "matrices",
    "lines",
    "length",
    "group_lines",
    "groups",
    "batch",
    # of a parameter or gradient that is not contiguous: (size, strides of p and of g) of the dimensions of matrices,
    # lines and places, innermost first: where they start in the table, and how many
    "matrix_dims",
    "matrix_ndim",
    "line_dims",
    "line_ndim",
    "place_dims",
    "place_ndim",
)


def matrix_shape(shape: tuple[int, ...], conv: bool) -> tuple[int, int, int]:
    """Return (matrices, rows, columns) of a parameter.

    Those of a stack of matrices over the last two dimensions, or with ``conv`` of one matrix whose columns are all
    dimensions but the first; of fewer than two dimensions one row.
    """
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    if conv:
        return 1, shape[0], math.prod(shape[1:])
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def as_matrices(tensor: Tensor, conv: bool) -> Tensor:
    """View a tensor as [matrices, rows, columns]; a contiguous copy where strides do not allow that."""
    return tensor.reshape(matrix_shape(tuple(tensor.shape), conv))


def is_transposed(geometry: Geometry, conv: bool) -> bool:
    """Say whether each matrix of parameter and gradient is contiguous once its two dimensions are swapped."""
    if geometry.strides is None or len(geometry.shape) < 2 or (conv and len(geometry.shape) > 2):
        return False
    *outer, n, m = geometry.shape
    swapped = [*outer, m, n]
    expected, stride = [0] * len(swapped), 1
    for dim in reversed(range(len(swapped))):
        expected[dim] = stride
        stride *= swapped[dim]
    expected[-2:] = reversed(expected[-2:])
    return all(
        size == 1 or found == wanted
        for strides in geometry.strides
        for size, found, wanted in zip(geometry.shape, strides, expected, strict=True)
    )


def line_dims(geometry: Geometry, rows: bool, conv: bool) -> tuple[list[int], dict[str, int], dict[str, int]]:
    """Return what LINE_FIELDS says of dimensions, where lines are rows, or columns: (numbers, starts, counts).

    Starts and counts are fields; the starts are places among the numbers.
    """
    names = ("matrix", "line", "place") if rows else ("matrix", "place", "line")
    if geometry.strides is None:
        return [], {f"{name}_dims": 0 for name in names}, {f"{name}_ndim": 0 for name in names}
    shape, (param, grad) = geometry.shape, geometry.strides
    ends = (0, 0) if len(shape) < 2 else (0, 1) if conv else (len(shape) - 2, len(shape) - 1)
    dims, starts, counts = list[int](), {}, {}
    for name, part in zip(names, (slice(0, ends[0]), slice(*ends), slice(ends[1], None)), strict=True):
        extents = list(reversed(collapse(shape[part], param[part], grad[part])))
        starts[f"{name}_dims"], counts[f"{name}_ndim"] = len(dims), len(extents)
        dims += [number for extent in extents for number in extent]
    return dims, starts, counts


class Cut(NamedTuple):
    """How the lines of a parameter are shared among tickets: fields of LINE_FIELDS, and how many tickets there are."""

    group_lines: int
    groups: int
    batch: int
    tickets: int


def cut_lines(matrices: int, lines: int, length: int, tile: Shape, max_groups: int) -> Cut:
    """Return the cut into groups of whole tiles, at most ``max_groups`` of a parameter unless it has more matrices."""
    blocks = -(-lines // tile.rows)
    groups = max(1, min(blocks, max_groups // max(matrices, 1)))
    group_lines = max(1, -(-blocks // groups)) * tile.rows
    groups = max(1, -(-lines // group_lines))
    tiles = blocks * -(-max(length, 1) // tile.cols)
    batch = max(1, SMALL_TILES // max(tiles, 1)) if groups == 1 else 1
    return Cut(group_lines, groups, batch, max(1, -(-matrices // batch)) * groups)
