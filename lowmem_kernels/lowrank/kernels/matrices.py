"""Finding a matrix in the table of schedule.py, and reading tiles of it. Shared by the kernels of this family.

``at`` is (table_ptr, row_ptr, addresses_ptr): the table, the matrix's row in it, and the addresses of the parameters.
"""

import triton
import triton.language as tl

from ...field_fragments import column_address, field, field32
from ...fragments import find_owner, transformed
from ..schedule import COLUMNS as _COLUMNS
from ..schedule import FIELDS as _FIELDS

FIELD_COUNT, COLUMN_COUNT = tl.constexpr(len(_FIELDS)), tl.constexpr(len(_COLUMNS))
(
    OWNER, KEY, M, N, START, FIRST_ROW, FIRST_COL, ROW_BLOCK, COL_BLOCK, TILE, OWNER_TILE, OWNER_TILES, NUMEL,
    OFFSET, _, ROW_STRIDE, _, ROW_OFFSETS, _, COL_OFFSETS, _, RANKS, LEFT, RIGHT, LEFT_SCRATCH, RIGHT_SCRATCH,
    ROW_GROUP, ROW_ENTRY, COL_GROUP, COL_ENTRY,
) = [tl.constexpr(i) for i in range(len(_FIELDS))]  # fmt: skip
OF_PARAM, OF_GRAD, STEP, EXP_AVG, LEFT_STATE, RIGHT_STATE, EXP_AVG_SQ, ROW_SQ, COL_SQ = [
    tl.constexpr(i) for i in range(len(_COLUMNS))
]


@triton.jit
def matrix_at(table_ptr, addresses_ptr, matrix):
    """``at`` of a matrix of the table."""
    return table_ptr, table_ptr + tl.full((), 0, tl.int64) + matrix * FIELD_COUNT, addresses_ptr


@triton.jit
def find_matrix(table_ptr, matrices, tile, FIELD: tl.constexpr):
    """The matrix that owns a tile."""
    return find_owner(table_ptr, 0, matrices, tile, FIELD_COUNT, FIELD)


@triton.jit
def sides(at, ALIGNED: tl.constexpr):
    """(m, n), int32. Where ALIGNED n is a product by 8, so that the compiler can prove that no mask cuts a vector."""
    n = field32(at, N)
    if ALIGNED:
        n = (n // 8) * 8
    return field32(at, M), n


@triton.jit
def offset_of(at, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """A field that counts elements from an address, and where ALIGNED is known to be a multiple of eight."""
    offset = field(at, FIELD)
    if ALIGNED:
        offset = (offset // 8) * 8
    return offset


@triton.jit
def address_of(at, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a tensor of the matrix's parameter starts."""
    _, _, addresses_ptr = at
    return column_address(addresses_ptr + field(at, OWNER) * COLUMN_COUNT, COLUMN, DTYPE, ALIGNED)


@triton.jit
def tile_pointers(
    at, rows, cols, shape, OPERAND: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr
):
    """Pointers to a tile of the parameter (OF_PARAM) or of the gradient (OF_GRAD)."""
    m, n = shape
    pointer = address_of(at, OPERAND, DTYPE, ALIGNED)
    if STRIDED:
        table_ptr, _, _ = at
        row_offsets_ptr = table_ptr + field(at, ROW_OFFSETS + OPERAND)
        col_offsets_ptr = table_ptr + field(at, COL_OFFSETS + OPERAND)
        row_offsets = tl.load(row_offsets_ptr + rows, mask=rows < m, other=0)
        col_offsets = tl.load(col_offsets_ptr + cols, mask=cols < n, other=0)
        return pointer + (row_offsets[:, None] + col_offsets[None, :])
    else:
        stride = offset_of(at, ROW_STRIDE + OPERAND, ALIGNED)
        return (
            pointer + offset_of(at, OFFSET + OPERAND, ALIGNED) + (rows.to(tl.int64)[:, None] * stride + cols[None, :])
        )


@triton.jit
def state_pointers(at, rows, cols, shape, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to a tile of an fp32 state of the parameter's shape."""
    _, n = shape
    pointer = address_of(at, COLUMN, tl.float32, ALIGNED) + offset_of(at, START, ALIGNED)
    return pointer + (rows.to(tl.int64)[:, None] * n + cols[None, :])


@triton.jit
def inside(rows, cols, shape):
    """Which elements of a tile are in the matrix."""
    m, n = shape
    return (rows < m)[:, None] & (cols < n)[None, :]


@triton.jit
def gradient_tile(
    at, rows, cols, shape, gradient, GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
):  # fmt: skip
    """(g, usable): the gradient as options.GradTransform says, NaN where it may not be used; 0 outside of it."""
    pointers = tile_pointers(at, rows, cols, shape, OF_GRAD, GRAD_TYPE, ALIGNED, STRIDED)
    g, usable = transformed(tl.load(pointers, mask=inside(rows, cols, shape), other=0.0), gradient, SKIP_NONFINITE)
    return tl.where(usable, g, float("nan")), usable


@triton.jit
def left_tile(pointer, rows, m, rank, RANK: tl.constexpr):
    """(pointers, mask) of rows of a factor L or what is like it, [m, rank]."""
    lanes = tl.arange(0, RANK)
    pointers = pointer + (rows.to(tl.int64)[:, None] * rank + lanes[None, :])
    return pointers, (rows < m)[:, None] & (lanes < rank)[None, :]


@triton.jit
def right_tile(pointer, cols, n, rank, RANK: tl.constexpr):
    """(pointers, mask) of columns of a factor R or what is like it, [rank, n]."""
    lanes = tl.arange(0, RANK)
    pointers = pointer + (lanes.to(tl.int64)[:, None] * n + cols[None, :])
    return pointers, (lanes < rank)[:, None] & (cols < n)[None, :]


@triton.jit
def small(pointer, matrix, INDEX: tl.constexpr, RANK: tl.constexpr):
    """Pointers to one of the four RANK x RANK matrices that a problem has."""
    lanes = tl.arange(0, RANK)
    base = pointer + (matrix.to(tl.int64) * 4 + INDEX) * (RANK * RANK)
    return base + lanes[:, None] * RANK + lanes[None, :]
