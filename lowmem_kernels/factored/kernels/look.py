"""The phases that all rules begin with: the sums over g, then the column factor and the scalars; and the end."""

import triton
import triton.language as tl

from ...field_fragments import by_fours, column_address, field, field32, scratch, sum_groups, sum_of
from ...fragments import count_skipped, is_finite, lerp, load_gradient
from .constants import (
    COL_COLUMN,
    COL_SCALE,
    COL_TICKETS,
    DECAY,
    FELT,
    FLOORED,
    FULL,
    G_COLUMN,
    GROUPS,
    LOOK,
    LOOK_SUMS,
    MATRICES,
    NEW_COL,
    NEW_ROW,
    NUMEL,
    OK,
    P_COLUMN,
    PARAM_SUM,
    PARTIAL,
    ROW_COLUMN,
    ROW_MEAN,
    ROW_MIN,
    ROW_SUM,
    ROWS,
    SCALARS_START,
    SLAB,
    SLAB_TICKETS,
    SLAB_WIDTH,
    STEP_COLUMN,
    STEP_SIZE,
    SUMS_START,
    TICKETS,
    UPDATE_SUM,
    UPDATE_SUMS,
    M,
    N,
)
from .moment import col_scales, factored_scale, full_moment, row_scales, safe_rsqrt
from .walk import matrices_of, matrix, min_of, offsets, rows_of, scalar, tile, widths

# the smallest normal number: 1/R of smaller ones may be Inf, so that the column sums do not tell the sum of u²
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def sum_squares_tile(
    at, ticket, x_ptr, OPERAND: tl.constexpr,
    ALIGNED: tl.constexpr, STRIDED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Sum of squares of a ticket's elements, added tile by tile as the apply phase does."""
    first, end = matrices_of(at, ticket, GROUPS)
    _group, first_row, end_row = rows_of(at, ticket)
    width = widths(at, ALIGNED)
    n, m, _last = width
    size = n.to(tl.int64) * m
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS // 4), tl.float32)
    for e in range(first, end):
        e_ptr = matrix(at, x_ptr, tl.full((), 0, tl.int32) + e, size, OPERAND, STRIDED)
        for row in range(first_row, end_row, BLOCK_ROWS):
            for col in range(0, m, BLOCK_COLS):
                rows, cols, mask = tile(row, col, width, BLOCK_ROWS, BLOCK_COLS)
                x_ptrs = e_ptr + offsets(at, rows, cols, m, OPERAND, STRIDED)
                x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
                squares += by_fours(x * x)
    return tl.sum(squares)


@triton.jit
def look_full_tile(
    at, ticket, g_ptr, v_ptr, gradient, moments,
    ALIGNED: tl.constexpr, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr, EPS_FLOOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """First look at a group of a parameter whose moment is kept in full. Writes its sum of u²; V stays."""
    _group, first_row, end_row = rows_of(at, ticket)
    width = widths(at, ALIGNED)
    _n, m, _last = width
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS // 4), tl.float32)
    for row in range(first_row, end_row, BLOCK_ROWS):
        rows, cols, mask = tile(row, 0, width, BLOCK_ROWS, BLOCK_COLS)
        g = load_gradient(g_ptr + offsets(at, rows, cols, m, 1, STRIDED), mask, gradient, SKIP_NONFINITE)
        v = tl.load(v_ptr + offsets(at, rows, cols, m, 2, STRIDED), mask=mask, other=1.0)
        new_v, scale = full_moment(v, g, moments, EPS_FLOOR)
        u = g * scale
        # g² may be Inf where g is not, and then u is 0
        squares += by_fours(u * u + 0.0 * new_v)
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
    width = widths(at, ALIGNED)
    n, m, _last = width
    size = n.to(tl.int64) * m
    first, end = matrices_of(at, ticket, GROUPS)
    group, first_row, end_row = rows_of(at, ticket)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i  # a loop counter is a Python number in the interpreter
        e_ptr = matrix(at, g_ptr, e, size, 1, STRIDED)
        e_group = e.to(tl.int64) * field(at, GROUPS) + group
        partial_ptr = scratch(at, PARTIAL) + e_group * 2 * m
        sum_r = 0.0
        min_r = float("inf")
        for row in range(first_row, end_row, BLOCK_ROWS):
            squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS // 4), tl.float32)
            for col in range(0, m, BLOCK_COLS):
                rows, cols, mask = tile(row, col, width, BLOCK_ROWS, BLOCK_COLS)
                pointers = e_ptr + offsets(at, rows, cols, m, 1, STRIDED)
                g = load_gradient(pointers, mask, gradient, SKIP_NONFINITE)
                squares += by_fours(g * g)
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
                rows, cols, mask = tile(row, col, width, BLOCK_ROWS, BLOCK_COLS)
                pointers = e_ptr + offsets(at, rows, cols, m, 1, STRIDED)
                g = load_gradient(pointers, mask, gradient, SKIP_NONFINITE)
                q = g * g
                # of the group's earlier rows
                earlier = (cols < m) & (row > first_row)
                sum_q = tl.load(partial_ptr + cols, mask=earlier, other=0.0, cache_modifier=".cg")
                weighted = tl.load(partial_ptr + m + cols, mask=earlier, other=0.0, cache_modifier=".cg")
                tl.store(partial_ptr + cols, sum_q + tl.sum(q, 0), mask=cols < m)
                tl.store(partial_ptr + m + cols, weighted + tl.sum(q * inverse[:, None], 0), mask=cols < m)
            # another thread may read these sums for the next rows
            tl.debug_barrier()
        tl.store(scratch(at, ROW_SUM) + e_group, sum_r)
        if EPS_FLOOR:
            tl.store(scratch(at, ROW_MIN) + e_group, min_r)


@triton.jit
def sums_tile(at, ticket, to_ptr, BOTH: tl.constexpr):
    """A slab of columns of a piece, or some small matrices. Writes column sums over the groups, and those of R.

    ``to_ptr`` is where the parameter's sums start, which are then added up over processes. BOTH: two for each column.
    """
    m = field32(at, M)
    groups = field32(at, GROUPS)
    # a piece without rows has left no sums
    filled = tl.where(field(at, N) > 0, groups, 0)
    spacing = 2 * m if BOTH else m
    first, end = matrices_of(at, ticket, SLAB_TICKETS)
    first_col = (ticket % field32(at, SLAB_TICKETS)) * field32(at, SLAB_WIDTH)
    end_col = tl.minimum(first_col + field32(at, SLAB_WIDTH), m)
    for i in range(first, end):
        e = (tl.full((), 0, tl.int32) + i).to(tl.int64)
        if first_col == 0:
            sum_r = sum_of(scratch(at, ROW_SUM) + e * groups, groups)
            tl.store(to_ptr + field(at, MATRICES) * spacing + e, sum_r)
        partial_ptr = scratch(at, PARTIAL) + e * groups * 2 * m
        for col in range(first_col, end_col, SLAB):
            cols = col + tl.arange(0, SLAB)
            first_sum, second_sum = sum_groups(partial_ptr, filled, 2 * m, cols, m, SLAB, BOTH)
            tl.store(to_ptr + e * spacing + cols, first_sum, mask=cols < m)
            if BOTH:
                tl.store(to_ptr + e * spacing + m + cols, second_sum, mask=cols < m)


@triton.jit
def sums_of(at, sums_ptr):
    """Pointer to the sums of a piece's first look."""
    return sums_ptr + field(at, SUMS_START)


@triton.jit
def param_sum_in(at, sums_ptr):
    """Pointer to the sum of p² there."""
    return sums_of(at, sums_ptr) + field(at, MATRICES) * (2 * field(at, M) + 1)


@triton.jit
def columns_tile(at, ticket, col_ptr, sums_ptr, moments, EPS_FLOOR: tl.constexpr):
    """A slab of columns, or some small matrices. Writes the new C and its 1/sqrt, mean(R), and the share of sum u².

    sum_ij u² = mean(R) sum_j (sum_i g²/R_i) / C_j, of the sums of all processes where there are sums_ptr.
    """
    weight, eps = moments
    n = field32(at, ROWS)
    m = field32(at, M)
    groups = field32(at, GROUPS)
    first, end = matrices_of(at, ticket, SLAB_TICKETS)
    first_col = (ticket % field32(at, SLAB_TICKETS)) * field32(at, SLAB_WIDTH)
    end_col = tl.minimum(first_col + field32(at, SLAB_WIDTH), m)
    squares = 0.0
    floored = 0.0
    for i in range(first, end):
        e = (tl.full((), 0, tl.int32) + i).to(tl.int64)
        if sums_ptr is None:
            mean_r = sum_of(scratch(at, ROW_SUM) + e * groups, groups) / n
        else:
            mean_r = tl.load(sums_of(at, sums_ptr) + field(at, MATRICES) * 2 * m + e) / n
        if EPS_FLOOR:
            mean_r = tl.maximum(mean_r, eps, propagate_nan=tl.PropagateNan.ALL)
            min_r = min_of(scratch(at, ROW_MIN) + e * groups, groups)
        if first_col == 0:
            tl.store(scratch(at, ROW_MEAN) + e, mean_r)
        partial_ptr = scratch(at, PARTIAL) + e * groups * 2 * m
        for col in range(first_col, end_col, SLAB):
            cols = col + tl.arange(0, SLAB)
            if sums_ptr is None:
                sum_q, weighted = sum_groups(partial_ptr, groups, 2 * m, cols, m, SLAB, True)
            else:
                total_ptr = sums_of(at, sums_ptr) + e * 2 * m + cols
                sum_q = tl.load(total_ptr, mask=cols < m, other=0.0)
                weighted = tl.load(total_ptr + m, mask=cols < m, other=0.0)
            old_c = tl.load(col_ptr + e * m + cols, mask=cols < m, other=0.0)
            if EPS_FLOOR:
                c = lerp(old_c, sum_q / n, weight)
                min_c = tl.min(tl.where((cols < m) & (sum_q > 0.0), c, float("inf")))
                floored += tl.where(min_r / mean_r * min_c <= tl.maximum(eps * eps, _TINY), 1.0, 0.0)
            else:
                c = lerp(old_c, sum_q / n + eps, weight)
            tl.store(scratch(at, NEW_COL) + e * m + cols, c, mask=cols < m)
            tl.store(scratch(at, COL_SCALE) + e * m + cols, safe_rsqrt(c, EPS_FLOOR), mask=cols < m)
            share = tl.where((cols < m) & (c > 0.0), mean_r * weighted / c, 0.0)
            # sums of g² may be Inf where g is not, and then u is 0
            poison = tl.sum(0.0 * c) + 0.0 * mean_r
            squares += tl.sum(share) + poison
            floored += poison
    tl.store(scratch(at, UPDATE_SUM) + ticket, squares)
    if EPS_FLOOR:
        tl.store(scratch(at, FLOORED) + ticket, floored)


@triton.jit
def floor_tile(
    at, ticket, g_ptr, gradient, eps,
    ALIGNED: tl.constexpr, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Another look at g where the floor under V is felt, since then the column sums do not tell the sum of u²."""
    first, end = matrices_of(at, ticket, GROUPS)
    _group, first_row, end_row = rows_of(at, ticket)
    width = widths(at, ALIGNED)
    n, m, _last = width
    size = n.to(tl.int64) * m
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS // 4), tl.float32)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i
        e_ptr = matrix(at, g_ptr, e, size, 1, STRIDED)
        for row in range(first_row, end_row, BLOCK_ROWS):
            _r, row_scale = row_scales(at, e, row + tl.arange(0, BLOCK_ROWS), NEW_ROW, ROW_MEAN, True)
            for col in range(0, m, BLOCK_COLS):
                rows, cols, mask = tile(row, col, width, BLOCK_ROWS, BLOCK_COLS)
                col_scale = col_scales(at, e, cols, m, COL_SCALE)
                g_ptrs = e_ptr + offsets(at, rows, cols, m, 1, STRIDED)
                g = load_gradient(g_ptrs, mask, gradient, SKIP_NONFINITE)
                u = g * factored_scale(row_scale, col_scale, eps, True)
                squares += by_fours(u * u)
    tl.store(scratch(at, UPDATE_SUM) + ticket, tl.sum(squares))


@triton.jit
def carried_sum(param_sum_ptr):
    """The sum of p² that an earlier step left, NaN where there is none."""
    if param_sum_ptr is None:
        return tl.full((), float("nan"), tl.float32)
    else:
        return tl.load(param_sum_ptr)


@triton.jit
def finish(
    at, squares, step, param_sum_ptr, hyper,
    SCHEDULE: tl.constexpr, SCALE_PARAMETER: tl.constexpr, SCALE_DECAY: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
):  # fmt: skip
    """From the sum of u², write the parameter's scalars."""
    lr, weight_decay, clip_threshold, eps2 = hyper
    numel = tl.maximum(field(at, NUMEL), 1).to(tl.float32)
    rate = lr
    if SCHEDULE == "rsqrt":
        rate = tl.minimum(lr, tl.rsqrt(step))
    if SCHEDULE == "warmup":
        rate = tl.minimum(lr * step, tl.rsqrt(step))
    if SCALE_PARAMETER:
        param_sum = carried_sum(param_sum_ptr)
        if param_sum != param_sum:
            param_sum = sum_of(scratch(at, PARAM_SUM), field32(at, TICKETS))
        rate *= tl.maximum(eps2, tl.sqrt(param_sum / numel))
    if SCALE_DECAY:
        decay = rate * weight_decay
    else:
        decay = lr * weight_decay
    step_size = rate / tl.maximum(1.0, tl.sqrt(squares / numel) / clip_threshold, propagate_nan=tl.PropagateNan.ALL)
    scalars_ptr = scratch(at, SCALARS_START)
    tl.store(scalars_ptr + STEP_SIZE, step_size)
    tl.store(scalars_ptr + DECAY, decay)
    if SKIP_NONFINITE:
        tl.store(scalars_ptr + OK, tl.where(is_finite(squares), 1.0, 0.0))
    else:
        tl.store(scalars_ptr + OK, 1.0)


@triton.jit
def look_or_columns(
    at, phase, ticket, address_ptr, param_sum_ptr, sums_ptr, gradient, moments,
    PARAM: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr, EPS_FLOOR: tl.constexpr, SCALE_PARAMETER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A ticket of the phases that all rules begin with."""
    g_ptr = column_address(address_ptr, G_COLUMN, GRAD, ALIGNED)
    row_ptr = column_address(address_ptr, ROW_COLUMN, tl.float32, ALIGNED)
    if phase == LOOK:
        if SCALE_PARAMETER:
            carried = carried_sum(param_sum_ptr)
            if carried != carried:
                p_ptr = column_address(address_ptr, P_COLUMN, PARAM, ALIGNED)
                squares = sum_squares_tile(at, ticket, p_ptr, 0, ALIGNED, STRIDED, BLOCK_ROWS, BLOCK_COLS)
                tl.store(scratch(at, PARAM_SUM) + ticket, squares)
        if field(at, FULL) == 1:
            look_full_tile(
                at, ticket, g_ptr, row_ptr, gradient, moments,
                ALIGNED, STRIDED, SKIP_NONFINITE, EPS_FLOOR, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip
        else:
            look_factored_tile(
                at, ticket, g_ptr, row_ptr, gradient, moments,
                ALIGNED, STRIDED, SKIP_NONFINITE, EPS_FLOOR, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip
    else:
        if field(at, FULL) == 0:
            col_ptr = column_address(address_ptr, COL_COLUMN, tl.float32, False)
            if sums_ptr is None:
                columns_tile(at, ticket, col_ptr, sums_ptr, moments, EPS_FLOOR)
            else:
                if phase == LOOK_SUMS:
                    sums_tile(at, ticket, sums_of(at, sums_ptr), True)
                else:
                    columns_tile(at, ticket, col_ptr, sums_ptr, moments, EPS_FLOOR)


@triton.jit
def finish_columns(
    at, step, param_sum_ptr, sums_ptr, hyper, EPS_FLOOR: tl.constexpr,
    SCHEDULE: tl.constexpr, SCALE_PARAMETER: tl.constexpr, SCALE_DECAY: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
):  # fmt: skip
    """What the last ticket of a column phase does: all sums of u² are there."""
    squares = sum_of(scratch(at, UPDATE_SUM), field32(at, UPDATE_SUMS))
    if sums_ptr is not None:
        # of all processes, as if it had been carried
        param_sum_ptr = param_sum_in(at, sums_ptr)
    finish(at, squares, step, param_sum_ptr, hyper, SCHEDULE, SCALE_PARAMETER, SCALE_DECAY, SKIP_NONFINITE)
    if EPS_FLOOR:
        felt = 0.0
        if field(at, FULL) == 0:
            felt = sum_of(scratch(at, FLOORED), field32(at, COL_TICKETS))
        tl.store(scratch(at, SCALARS_START) + FELT, felt)


@triton.jit
def write_param_sum(at, param_sum_ptr, sums_ptr):
    """What the last ticket of a piece's sums does: put the sum of p² of its rows beside them."""
    squares = carried_sum(param_sum_ptr)
    if squares != squares:
        squares = sum_of(scratch(at, PARAM_SUM), field32(at, TICKETS))
    tl.store(param_sum_in(at, sums_ptr), squares)


@triton.jit
def end_step(at, address_ptr, step, skipped_ptr):
    """What the last ticket of an apply phase does: advance the parameter's step, or count the parameter."""
    if scalar(at, OK) == 1.0:
        tl.store(column_address(address_ptr, STEP_COLUMN, tl.float32, False), step)
    else:
        count_skipped(skipped_ptr, tl.full((), 1, tl.int32))
