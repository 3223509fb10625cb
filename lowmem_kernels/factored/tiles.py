"""Tile functions of the factored kernels: what a program does with one ticket. README.md beside this file has the picture.

``at`` is (table_ptr, row_ptr, scratch_ptr): the table, the parameter's row of fields.py in it, and the scratch.
"""

import triton
import triton.language as tl

from ..fragments import lerp, transformed
from .fields import FIELDS

# columns of a ticket of the column phases, and groups that are summed at a time
SLAB = 128
_SLAB = tl.constexpr(SLAB)
_GROUPS_AT_A_TIME = tl.constexpr(16)
# partial sums that are added at a time
_SUMS_AT_A_TIME = tl.constexpr(256)

(
    KEY, FULL, NUMEL, MATRICES, N, M, LIMIT, GROUP_ROWS, GROUPS, BATCH, TICKETS, SLAB_TICKETS, SLAB_WIDTH, COL_TICKETS,
    UPDATE_SUMS, NEW_ROW, NEW_COL, ROW_MEAN, PARTIAL, ROW_SUM, ROW_MIN, PARAM_SUM, NEW_PARAM_SUM, UPDATE_SUM, FLOORED,
    SCALARS, RES_ROW, RES_COL, RES_MEAN, DIMS, NDIM, PARAM_STRIDES, _, GRAD_STRIDES, _,
) = [tl.constexpr(i) for i in range(len(FIELDS))]  # fmt: skip


@triton.jit
def field(at, FIELD: tl.constexpr):
    """A field of the parameter's row, int64."""
    _, row_ptr, _ = at
    return tl.load(row_ptr + FIELD)


@triton.jit
def field32(at, FIELD: tl.constexpr):
    """A field that is known to fit into 32 bits."""
    return field(at, FIELD).to(tl.int32)


@triton.jit
def scratch(at, FIELD: tl.constexpr):
    """Pointer to what the scratch holds under a field."""
    _, row_ptr, scratch_ptr = at
    return scratch_ptr + tl.load(row_ptr + FIELD)


@triton.jit
def widths(at, ALIGNED: tl.constexpr):
    """(m, limit): elements of a row, int32, and of a matrix, int64.

    Where ALIGNED both are multiples of 8, as products, so that the compiler can prove that a mask never cuts a vector.
    """
    if ALIGNED:
        return (field32(at, M) // 8) * 8, (field(at, LIMIT) // 8) * 8
    else:
        return field32(at, M), field(at, LIMIT)


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
def matrix(at, pointer, e, OPERAND: tl.constexpr, STRIDED: tl.constexpr):
    """Pointer to matrix e of a tensor of the parameter's shape; only operands 0 (p) and 1 (g) can be STRIDED."""
    if STRIDED:
        table_ptr, _, _ = at
        dims_ptr = table_ptr + field(at, DIMS)
        index = e.to(tl.int64)
        offset = tl.zeros((), tl.int64)
        for dim in range(field32(at, NDIM)):
            size = tl.load(dims_ptr + 3 * dim)
            offset += (index % size) * tl.load(dims_ptr + 3 * dim + 1 + OPERAND)
            index = index // size
        return pointer + offset
    else:
        return pointer + e.to(tl.int64) * field(at, LIMIT)


@triton.jit
def tile(at, row, col, m, limit, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """(rows, cols, index, mask) of the tile that starts at (row, col): index counts elements of the matrix, int64."""
    rows = row + tl.arange(0, BLOCK_ROWS)
    cols = col + tl.arange(0, BLOCK_COLS)
    index = rows.to(tl.int64)[:, None] * m + cols[None, :]
    return rows, cols, index, (cols < m)[None, :] & (index < limit)


@triton.jit
def offsets(at, rows, cols, index, OPERAND: tl.constexpr, STRIDED: tl.constexpr):
    """Offsets of a tile in memory from the start of its matrix."""
    if STRIDED:
        STRIDES: tl.constexpr = GRAD_STRIDES if OPERAND == 1 else PARAM_STRIDES
        row_stride = field(at, STRIDES)
        col_stride = field(at, STRIDES + 1)
        return rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    else:
        return index


@triton.jit
def load_gradient(pointers, mask, gradient, SKIP_NONFINITE: tl.constexpr):
    """The gradient as options.GradTransform says; NaN where it may not be used, so that every sum shows it."""
    g, usable = transformed(tl.load(pointers, mask=mask, other=0.0), gradient, SKIP_NONFINITE)
    return tl.where(usable, g, float("nan"))


@triton.jit
def safe_rsqrt(x):
    """1 / sqrt(x), and 0 for 0: a moment of 0 belongs to gradients that are 0, whose update is not 0 * Inf."""
    return tl.where(x > 0.0, tl.rsqrt(x), 0.0)


@triton.jit
def full_moment(v, g, moments, EPS_FLOOR: tl.constexpr):
    """(new V, factor that makes g the update) of a moment kept in full."""
    weight, eps = moments
    if EPS_FLOOR:
        v = lerp(v, g * g, weight)
        return v, tl.rsqrt(tl.maximum(v, eps * eps))
    else:
        v = lerp(v, g * g + eps, weight)
        return v, safe_rsqrt(v)


@triton.jit
def factored_scale(row_scale, col_scale, eps, EPS_FLOOR: tl.constexpr):
    """Factor that makes a tile of g the update: 1 / sqrt(V), where the floor under V is eps²."""
    scale = row_scale[:, None] * col_scale[None, :]
    if EPS_FLOOR:
        scale = tl.minimum(scale, 1.0 / eps)
    return scale


@triton.jit
def row_scales(at, e, rows, NEW: tl.constexpr, MEAN: tl.constexpr):
    """sqrt(mean(R) / R) of the rows of matrix e, from the new R in the scratch (left there by another launch)."""
    n = field32(at, N)
    r = tl.load(scratch(at, NEW) + e.to(tl.int64) * n + rows, mask=rows < n, other=0.0, cache_modifier=".cg")
    mean = tl.load(scratch(at, MEAN) + e, cache_modifier=".cg")
    return r, tl.sqrt(mean) * safe_rsqrt(r)


@triton.jit
def col_scales(at, e, cols, m, NEW: tl.constexpr):
    """1 / sqrt(C) of columns of matrix e, from the new C in the scratch."""
    c = tl.load(scratch(at, NEW) + e.to(tl.int64) * m + cols, mask=cols < m, other=0.0, cache_modifier=".cg")
    return c, safe_rsqrt(c)


@triton.jit
def sum_of(pointer, count):
    """Sum of ``count`` numbers that other programs have written, in an order that depends on count only."""
    total = tl.zeros((_SUMS_AT_A_TIME,), tl.float32)
    lane = tl.arange(0, _SUMS_AT_A_TIME)
    for start in range(0, count, _SUMS_AT_A_TIME):
        total += tl.load(pointer + start + lane, mask=start + lane < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


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


@triton.jit
def sum_squares_tile(
    at, ticket, x_ptr, OPERAND: tl.constexpr,
    ALIGNED: tl.constexpr, STRIDED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Sum of squares of a ticket's elements, added tile by tile as the apply phase does."""
    first, end = matrices_of(at, ticket, GROUPS)
    _, first_row, end_row = rows_of(at, ticket)
    m, limit = widths(at, ALIGNED)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for e in range(first, end):
        e_ptr = matrix(at, x_ptr, tl.full((), 0, tl.int32) + e, OPERAND, STRIDED)
        for row in range(first_row, end_row, BLOCK_ROWS):
            for col in range(0, m, BLOCK_COLS):
                rows, cols, index, mask = tile(at, row, col, m, limit, BLOCK_ROWS, BLOCK_COLS)
                x_ptrs = e_ptr + offsets(at, rows, cols, index, OPERAND, STRIDED)
                x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
                squares += x * x
    return tl.sum(squares)


@triton.jit
def look_full_tile(
    at, ticket, g_ptr, v_ptr, gradient, moments,
    ALIGNED: tl.constexpr, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr, EPS_FLOOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """First look at a group of a parameter whose moment is kept in full. Writes its sum of u²; V stays."""
    _, first_row, end_row = rows_of(at, ticket)
    m, limit = widths(at, ALIGNED)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for row in range(first_row, end_row, BLOCK_ROWS):
        rows, cols, index, mask = tile(at, row, 0, m, limit, BLOCK_ROWS, BLOCK_COLS)
        g = load_gradient(g_ptr + offsets(at, rows, cols, index, 1, STRIDED), mask, gradient, SKIP_NONFINITE)
        v = tl.load(v_ptr + index, mask=mask, other=1.0)
        _, scale = full_moment(v, g, moments, EPS_FLOOR)
        u = tl.where(mask, g * scale, 0.0)
        squares += u * u
    tl.store(scratch(at, UPDATE_SUM) + ticket, tl.sum(squares))


@triton.jit
def look_factored_tile(
    at, ticket, g_ptr, row_ptr, gradient, moments,
    ALIGNED: tl.constexpr, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr, EPS_FLOOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """First look at a group of rows. Writes their new R, and over the group: its sum, the column sums of g² and g²/R.

    The rows of a block are swept twice, since g²/R needs the whole row; the second time they come from a cache.
    """
    weight, eps = moments
    n = field32(at, N)
    m, limit = widths(at, ALIGNED)
    first, end = matrices_of(at, ticket, GROUPS)
    group, first_row, end_row = rows_of(at, ticket)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i  # a loop counter is a Python number in the interpreter
        e_ptr = matrix(at, g_ptr, e, 1, STRIDED)
        e_group = e.to(tl.int64) * field(at, GROUPS) + group
        partial_ptr = scratch(at, PARTIAL) + e_group * 2 * m
        sum_r = 0.0
        min_r = float("inf")
        for row in range(first_row, end_row, BLOCK_ROWS):
            squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
            for col in range(0, m, BLOCK_COLS):
                rows, cols, index, mask = tile(at, row, col, m, limit, BLOCK_ROWS, BLOCK_COLS)
                pointers = e_ptr + offsets(at, rows, cols, index, 1, STRIDED)
                g = load_gradient(pointers, mask, gradient, SKIP_NONFINITE)
                squares += g * g
            rows = row + tl.arange(0, BLOCK_ROWS)
            mean = tl.sum(squares, 1) / m
            old_r = tl.load(row_ptr + e.to(tl.int64) * n + rows, mask=rows < n, other=0.0)
            if EPS_FLOOR:
                r = lerp(old_r, mean, weight)
                min_r = tl.minimum(min_r, tl.min(tl.where((rows < n) & (mean > 0.0), r, float("inf"))))
            else:
                r = lerp(old_r, mean + eps, weight)
            tl.store(scratch(at, NEW_ROW) + e.to(tl.int64) * n + rows, r, mask=rows < n)
            sum_r += tl.sum(tl.where(rows < n, r, 0.0))
            inverse = tl.where(r > 0.0, 1.0 / r, tl.where(r == 0.0, 0.0, r))
            for col in range(0, m, BLOCK_COLS):
                rows, cols, index, mask = tile(at, row, col, m, limit, BLOCK_ROWS, BLOCK_COLS)
                pointers = e_ptr + offsets(at, rows, cols, index, 1, STRIDED)
                g = load_gradient(pointers, mask, gradient, SKIP_NONFINITE)
                q = g * g
                # of the group's earlier rows
                earlier = (cols < m) & (row > first_row)
                sum_q = tl.load(partial_ptr + cols, mask=earlier, other=0.0)
                weighted = tl.load(partial_ptr + m + cols, mask=earlier, other=0.0)
                tl.store(partial_ptr + cols, sum_q + tl.sum(q, 0), mask=cols < m)
                tl.store(partial_ptr + m + cols, weighted + tl.sum(q * inverse[:, None], 0), mask=cols < m)
            # another thread may read these sums for the next rows
            tl.debug_barrier()
        tl.store(scratch(at, ROW_SUM) + e_group, sum_r)
        if EPS_FLOOR:
            tl.store(scratch(at, ROW_MIN) + e_group, min_r)


@triton.jit
def sum_groups(pointer, groups, stride, cols, m):
    """Column sums over the groups of a matrix, in their order: 16 at a time as a tree."""
    total = tl.zeros((_SLAB,), tl.float32)
    for start in range(0, groups, _GROUPS_AT_A_TIME):
        group = start + tl.arange(0, _GROUPS_AT_A_TIME)
        pointers = pointer + group.to(tl.int64)[:, None] * stride + cols[None, :]
        mask = (group < groups)[:, None] & (cols < m)[None, :]
        total += tl.sum(tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    return total


@triton.jit
def columns_tile(at, ticket, col_ptr, moments, EPS_FLOOR: tl.constexpr):
    """A slab of columns, or some small matrices. Writes the new C, mean(R), and the slab's share of the sum of u².

    sum_ij u² = mean(R) sum_j (sum_i g²/R_i) / C_j
    """
    weight, eps = moments
    n = field32(at, N)
    m = field32(at, M)
    groups = field32(at, GROUPS)
    first, end = matrices_of(at, ticket, SLAB_TICKETS)
    first_col = (ticket % field32(at, SLAB_TICKETS)) * field32(at, SLAB_WIDTH)
    end_col = tl.minimum(first_col + field32(at, SLAB_WIDTH), m)
    squares = 0.0
    floored = 0.0
    for i in range(first, end):
        e = (tl.full((), 0, tl.int32) + i).to(tl.int64)
        mean_r = sum_of(scratch(at, ROW_SUM) + e * groups, groups) / n
        if EPS_FLOOR:
            mean_r = tl.maximum(mean_r, eps, propagate_nan=tl.PropagateNan.ALL)
            min_r = min_of(scratch(at, ROW_MIN) + e * groups, groups)
        if first_col == 0:
            tl.store(scratch(at, ROW_MEAN) + e, mean_r)
        partial_ptr = scratch(at, PARTIAL) + e * groups * 2 * m
        for col in range(first_col, end_col, _SLAB):
            cols = col + tl.arange(0, _SLAB)
            sum_q = sum_groups(partial_ptr, groups, 2 * m, cols, m)
            weighted = sum_groups(partial_ptr + m, groups, 2 * m, cols, m)
            old_c = tl.load(col_ptr + e * m + cols, mask=cols < m, other=0.0)
            if EPS_FLOOR:
                c = lerp(old_c, sum_q / n, weight)
                min_c = tl.min(tl.where((cols < m) & (sum_q > 0.0), c, float("inf")))
                floored = tl.where(min_r / mean_r * min_c < eps * eps, 1.0, floored)
            else:
                c = lerp(old_c, sum_q / n + eps, weight)
            tl.store(scratch(at, NEW_COL) + e * m + cols, c, mask=cols < m)
            share = tl.where(c > 0.0, mean_r * weighted / c, tl.where(c == 0.0, 0.0, c))
            squares += tl.sum(tl.where(cols < m, share, 0.0))
    tl.store(scratch(at, UPDATE_SUM) + ticket, squares)
    if EPS_FLOOR:
        tl.store(scratch(at, FLOORED) + ticket, floored)


@triton.jit
def residual_columns_tile(at, ticket, res_col_ptr, weight3, eps2):
    """A slab of columns of CAME's residual, or some small matrices. Writes the new Cs and mean(Rs)."""
    n = field32(at, N)
    m = field32(at, M)
    groups = field32(at, GROUPS)
    first, end = matrices_of(at, ticket, SLAB_TICKETS)
    first_col = (ticket % field32(at, SLAB_TICKETS)) * field32(at, SLAB_WIDTH)
    end_col = tl.minimum(first_col + field32(at, SLAB_WIDTH), m)
    for i in range(first, end):
        e = (tl.full((), 0, tl.int32) + i).to(tl.int64)
        if first_col == 0:
            tl.store(scratch(at, RES_MEAN) + e, sum_of(scratch(at, ROW_SUM) + e * groups, groups) / n)
        partial_ptr = scratch(at, PARTIAL) + e * groups * 2 * m
        for col in range(first_col, end_col, _SLAB):
            cols = col + tl.arange(0, _SLAB)
            sum_s = sum_groups(partial_ptr, groups, 2 * m, cols, m)
            old_c = tl.load(res_col_ptr + e * m + cols, mask=cols < m, other=0.0)
            tl.store(scratch(at, RES_COL) + e * m + cols, lerp(old_c, sum_s / n + eps2, weight3), mask=cols < m)
