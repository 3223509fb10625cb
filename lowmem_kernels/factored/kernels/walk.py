"""Finding the way from a ticket to its matrices, rows and tiles. ``at`` is as in field_fragments.py."""

import triton
import triton.language as tl

from ...field_fragments import field, field32, rows_in_whole, scratch, walk_dims
from .constants import (
    BATCH,
    DIMS,
    FIRST_ROW,
    GRAD_STRIDES,
    GROUP_ROWS,
    GROUPS,
    LAST,
    MATRICES,
    NDIM,
    PARAM_STRIDES,
    ROWS,
    SCALARS_START,
    M,
    N,
)

# partial sums that are looked through at a time: as many loads in flight as there are registers for
_SUMS_AT_A_TIME = tl.constexpr(256)


@triton.jit
def scalar(at, SCALAR: tl.constexpr):
    """One of the parameter's scalars, which the last program of an earlier phase left."""
    return tl.load(scratch(at, SCALARS_START) + SCALAR, cache_modifier=".cg")


@triton.jit
def widths(at, ALIGNED: tl.constexpr):
    """(n, m, last): rows, elements of a row, elements of the last row.

    Where ALIGNED the last two are multiples of 8, as products, so that the compiler can prove that a mask never cuts a
    vector.
    """
    if ALIGNED:
        return field32(at, N), (field32(at, M) // 8) * 8, (field32(at, LAST) // 8) * 8
    else:
        return field32(at, N), field32(at, M), field32(at, LAST)


@triton.jit
def matrices_of(at, ticket, PER: tl.constexpr):
    """(first, end) of the matrices of a ticket, of which ``PER`` (a field) tickets share a matrix."""
    first = (ticket // field32(at, PER)) * field32(at, BATCH)
    return first, tl.minimum(first + field32(at, BATCH), field32(at, MATRICES))


@triton.jit
def rows_of(at, ticket):
    """(group, first row, end row) of a ticket."""
    group = ticket % field32(at, GROUPS)
    first = group * field32(at, GROUP_ROWS)
    return group, first, tl.minimum(first + field32(at, GROUP_ROWS), field32(at, N))


@triton.jit
def matrix(at, pointer, e, size, OPERAND: tl.constexpr, STRIDED: tl.constexpr):
    """Pointer to matrix e of a tensor of the parameter's shape; only operands 0 (p) and 1 (g) can be STRIDED."""
    if STRIDED:
        return pointer + walk_dims(at, field(at, DIMS), field32(at, NDIM), e, OPERAND, 2)
    else:
        return pointer + e.to(tl.int64) * size


@triton.jit
def tile(row, col, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """(rows, cols, mask) of the tile that starts at (row, col)."""
    n, m, last = width
    rows = row + tl.arange(0, BLOCK_ROWS)
    cols = col + tl.arange(0, BLOCK_COLS)
    # as in widths(): the bound of the mask must be seen to be a multiple of 8, where it is
    bounds = tl.where(rows < n - 1, m, tl.where(rows < n, last, 0))
    return rows, cols, cols[None, :] < bounds[:, None]


@triton.jit
def offsets(at, rows, cols, m, OPERAND: tl.constexpr, STRIDED: tl.constexpr):
    """Offsets of a tile in memory from the start of its matrix, int64; OPERAND 2 is always contiguous."""
    if STRIDED and OPERAND != 2:
        STRIDES: tl.constexpr = GRAD_STRIDES if OPERAND == 1 else PARAM_STRIDES
        row_stride = field(at, STRIDES)
        col_stride = field(at, STRIDES + 1)
        return rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    else:
        return rows.to(tl.int64)[:, None] * m + cols[None, :]


@triton.jit
def places_in_whole(at, start, e, rows, m, PIECES: tl.constexpr):
    """Index in the whole parameter of the first element of each of these rows of matrix e, on which noise depends.

    ``start`` is that of the matrix, of parameters that are not PIECES.
    """
    if PIECES:
        return (e.to(tl.int64) * field(at, ROWS) + rows_in_whole(at, rows, FIRST_ROW)) * m
    else:
        return start + rows.to(tl.int64) * m


@triton.jit
def min_of(pointer, count):
    """Smallest of ``count`` numbers that other programs have written."""
    smallest = tl.full((_SUMS_AT_A_TIME,), float("inf"), tl.float32)
    lane = tl.arange(0, _SUMS_AT_A_TIME)
    for start in range(0, count, _SUMS_AT_A_TIME):
        mask = start + lane < count
        x = tl.load(pointer + start + lane, mask=mask, other=float("inf"), cache_modifier=".cg")
        smallest = tl.minimum(smallest, x)
    return tl.min(smallest)
