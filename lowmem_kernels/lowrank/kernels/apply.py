"""Second moments of groups, and the update itself."""

import triton
import triton.language as tl

from ...field_fragments import field, field32, sum_of
from ...fragments import (
    count_skipped,
    is_finite,
    is_last_program,
    lerp,
    one_minus_power,
    rounded,
    scalar_or,
    stream_key,
)
from .matrices import (
    COL_ENTRY,
    COL_GROUP,
    COL_SQ,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST_COL,
    FIRST_ROW,
    KEY,
    LEFT,
    LEFT_SCRATCH,
    LEFT_STATE,
    NUMEL,
    OF_PARAM,
    OWNER,
    OWNER_TILE,
    OWNER_TILES,
    RANKS,
    RIGHT,
    RIGHT_SCRATCH,
    RIGHT_STATE,
    ROW_ENTRY,
    ROW_GROUP,
    ROW_SQ,
    START,
    STEP,
    TILE,
    M,
    N,
    address_of,
    find_matrix,
    gradient_tile,
    inside,
    left_tile,
    matrix_at,
    offset_of,
    right_tile,
    sides,
    state_pointers,
    tile_pointers,
)


@triton.jit
def _group_means(sums_ptr, state_ptr, count, group, length, weight, BLOCK: tl.constexpr):
    """v of all groups of a side, from the sums of squares of its rows (columns); returns the sum of all v."""
    groups = count // group
    elements = group.to(tl.float32) * length
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if group == 1:
        for start in range(0, count, BLOCK):
            mask = start + lane < count
            mean = tl.load(sums_ptr + start + lane, mask=mask, other=0.0) / elements
            new = lerp(tl.load(state_ptr + start + lane, mask=mask, other=0.0), mean, weight)
            tl.store(state_ptr + start + lane, new, mask=mask)
            total += tl.where(mask, new, 0.0)
    else:
        for index in range(groups):
            sums = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, group, BLOCK):
                mask = start + lane < group
                sums += tl.load(sums_ptr + index * group + start + lane, mask=mask, other=0.0)
            new = lerp(tl.load(state_ptr + index), tl.sum(sums) / elements, weight)
            tl.store(state_ptr + index, new)
    return tl.sum(total)


@triton.jit
def _group_moments_kernel(
    table_ptr, addresses_ptr, row_sums_ptr, col_sums_ptr, mean_ptr, bad_ptr, found_inf, one_minus_beta2,
    SKIP_NONFINITE: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """v of the groups of rows and columns of a matrix, which one program owns, and the mean of that of rows."""
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    matrix = tl.program_id(0)
    at = matrix_at(table_ptr, addresses_ptr, matrix)
    if SKIP_NONFINITE:
        if tl.load(bad_ptr + field(at, OWNER)) != 0:
            return
    m = field32(at, M)
    n = field32(at, N)
    if (m == 0) | (n == 0):
        return
    if SECOND != "cols":
        state_ptr = address_of(at, ROW_SQ, tl.float32, False) + field(at, ROW_ENTRY)
        sums_ptr = row_sums_ptr + field(at, FIRST_ROW)
        total = _group_means(sums_ptr, state_ptr, m, field32(at, ROW_GROUP), n, one_minus_beta2, BLOCK)
        tl.store(mean_ptr + matrix, total / m)
    if SECOND != "rows":
        state_ptr = address_of(at, COL_SQ, tl.float32, False) + field(at, COL_ENTRY)
        sums_ptr = col_sums_ptr + field(at, FIRST_COL)
        _group_means(sums_ptr, state_ptr, n, field32(at, COL_GROUP), m, one_minus_beta2, BLOCK)


@triton.jit
def _row_moments(
    at, rows, shape, gradient, matrix, mean_ptr, weight,
    GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    SECOND: tl.constexpr, RESIDENT: tl.constexpr, WRITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(v, or its share, of each row; which rows may be updated). Where RESIDENT v is made here, of all of the row."""
    m, n = shape
    state_ptrs = address_of(at, ROW_SQ, tl.float32, False) + field(at, ROW_ENTRY) + rows // field32(at, ROW_GROUP)
    old = tl.load(state_ptrs, mask=rows < m, other=0.0)
    usable = tl.full((BLOCK_M,), 1, tl.int1)
    if RESIDENT:
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for col in range(0, n, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            g, _ = gradient_tile(at, rows, cols, shape, gradient, GRAD_TYPE, ALIGNED, STRIDED, SKIP_NONFINITE)
            squares += tl.sum(g * g, 1)
        if SKIP_NONFINITE:
            usable = is_finite(squares)
        new = tl.where(usable, lerp(old, squares / n, weight), old)
        if WRITE:
            tl.store(state_ptrs, new, mask=rows < m)
        old = new
    elif SECOND == "factored":
        mean = tl.load(mean_ptr + matrix)
        old = tl.where(mean == 0.0, 0.0, old / mean)
    return old, usable


@triton.jit
def _update_rows(
    at, matrix, rows, first_col, end_col, scratch, mean_ptr, factor, step, gradient, hyper,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr, MOMENTUM: tl.constexpr, SECOND: tl.constexpr,
    RESIDENT: tl.constexpr, KEEP: tl.constexpr, WRITE: tl.constexpr, PRECISION: tl.constexpr,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Update a block of rows from one column to another. Returns (what was skipped, sum of squares of the update).

    Without WRITE nothing is written, and only the second is of use.
    """
    rate, decay, eps, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, carry, gamma, clip_element = hyper
    shape = sides(at, ALIGNED)
    m, n = shape
    correction = 1.0 / one_minus_power(log_beta1, step)
    root_correction = tl.rsqrt(one_minus_power(log_beta2, step))
    key = stream_key(field(at, KEY), step, 0)
    start = field(at, START)
    skipped = tl.zeros((BLOCK_M,), tl.int32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    usable_rows = tl.full((BLOCK_M,), 1, tl.int1)
    if SECOND == "rows" or SECOND == "factored":
        row_v, usable_rows = _row_moments(
            at, rows, shape, gradient, matrix, mean_ptr, one_minus_beta2,
            GRAD_TYPE, ALIGNED, STRIDED, SKIP_NONFINITE, SECOND, RESIDENT, WRITE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if KEEP == "row":
        skipped += ((rows < m) & (usable_rows == 0)).to(tl.int32)
    if MOMENTUM == "lowrank":
        old_left_ptr, old_right_ptr = scratch
        rank = field32(at, RANKS)
        old_left_ptrs, left_mask = left_tile(old_left_ptr + field(at, LEFT_SCRATCH), rows, m, rank, RANK)
        left_ptrs, _ = left_tile(address_of(at, LEFT_STATE, tl.float32, False) + field(at, LEFT), rows, m, rank, RANK)
        old_left = carry * tl.load(old_left_ptrs, mask=left_mask, other=0.0)
        # 1 / (1 - b^t) - gamma / (1 - b), and 0 without a rounding error in the first step
        weight = correction * ((1.0 - gamma) - carry * one_minus_power(log_beta1, step - 1.0))
        left = weight * tl.load(left_ptrs, mask=left_mask, other=0.0)
        old_right_ptr += offset_of(at, RIGHT_SCRATCH, ALIGNED)
        right_ptr = address_of(at, RIGHT_STATE, tl.float32, ALIGNED) + offset_of(at, RIGHT, ALIGNED)

    for col in range(first_col, end_col, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        mask = inside(rows, cols, shape)
        g, usable = gradient_tile(at, rows, cols, shape, gradient, GRAD_TYPE, ALIGNED, STRIDED, SKIP_NONFINITE)
        if KEEP == "row":
            usable = (usable_rows[:, None] != 0) & mask
        if MOMENTUM == "full":
            m_ptrs = state_pointers(at, rows, cols, shape, EXP_AVG, ALIGNED)
            old_m = tl.load(m_ptrs, mask=mask, other=0.0)
            new_m = lerp(old_m, g, one_minus_beta1)
            update = new_m * correction
        elif MOMENTUM == "lowrank":
            old_right_ptrs, right_mask = right_tile(old_right_ptr, cols, n, rank, RANK)
            right_ptrs, right_mask = right_tile(right_ptr, cols, n, rank, RANK)
            old_right = tl.load(old_right_ptrs, mask=right_mask, other=0.0)
            right = tl.load(right_ptrs, mask=right_mask, other=0.0)
            product = tl.dot(old_left, old_right, input_precision=PRECISION)
            product = tl.dot(left, right, product, input_precision=PRECISION)
            update = gamma * g + product
        else:
            update = g
        if SECOND == "element":
            v_ptrs = state_pointers(at, rows, cols, shape, EXP_AVG_SQ, ALIGNED)
            old_v = tl.load(v_ptrs, mask=mask, other=0.0)
            new_v = lerp(old_v, g * g, one_minus_beta2)
            root = tl.sqrt(new_v)
        else:
            if SECOND == "cols" or SECOND == "factored":
                col_ptrs = (
                    address_of(at, COL_SQ, tl.float32, False) + field(at, COL_ENTRY) + cols // field32(at, COL_GROUP)
                )
                col_v = tl.load(col_ptrs, mask=cols < n, other=0.0)
            if SECOND == "rows":
                root = tl.sqrt(row_v)[:, None]
            elif SECOND == "cols":
                root = tl.sqrt(col_v)[None, :]
            else:
                root = tl.sqrt(row_v[:, None] * col_v[None, :])
        # where there has been no gradient yet, nothing is to be made up for
        update = tl.where(root == 0.0, 0.0, update / (root * root_correction + eps))
        if WRITE:
            if clip_element is not None:
                update = tl.minimum(update, clip_element, propagate_nan=tl.PropagateNan.ALL)
                update = tl.maximum(update, -clip_element, propagate_nan=tl.PropagateNan.ALL)
            p_ptrs = tile_pointers(at, rows, cols, shape, OF_PARAM, PARAM_TYPE, ALIGNED, STRIDED)
            p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
            new_p = p - (rate * factor * update + decay * p)
            # the mask must stay free of data, or stores fall apart into elements: what is skipped is written back
            if KEEP != "parameter":
                new_p = tl.where(usable, new_p, p)
                if KEEP == "element":
                    skipped += tl.sum((mask & (usable == 0)).to(tl.int32), 1)
                if MOMENTUM == "full":
                    new_m = tl.where(usable, new_m, old_m)
                if SECOND == "element":
                    new_v = tl.where(usable, new_v, old_v)
            if MOMENTUM == "full":
                tl.store(m_ptrs, new_m, mask=mask)
            if SECOND == "element":
                tl.store(v_ptrs, new_v, mask=mask)
            index = start + rows.to(tl.int64)[:, None] * n
            tl.store(p_ptrs, rounded(new_p, key, index, cols[None, :], PARAM_TYPE, STOCHASTIC), mask=mask)
        else:
            squares += tl.sum(tl.where(mask, update * update, 0.0), 1)
    return tl.sum(skipped), tl.sum(squares)


@triton.jit(do_not_specialize=["matrices"])
def _momentum_update_kernel(
    table_ptr, addresses_ptr, left_ptr, right_ptr, mean_ptr, partial_ptr, clip_ptr, counter_ptr, bad_ptr, skipped_ptr,
    found_inf, matrices, lr, weight_decay, eps, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2,
    carry, gamma, clip_element, clip_rms, scale, inv_scale, clip_value, clip_coef,
    PARAM: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, STOCHASTIC: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr, MOMENTUM: tl.constexpr, SECOND: tl.constexpr, RESIDENT: tl.constexpr,
    KEEP: tl.constexpr, WRITE: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The update. One program owns BLOCK_M rows of one matrix, SPAN columns of them or, where RESIDENT, all.

    With WRITE it writes p, m and v there; the last program of a parameter advances its step, which all the others have
    read by then, or counts it as skipped. Without, it writes the sum of the update's squares; the last one makes the
    factor of the parameter's clipping of them, or its flag if they are not finite.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    tile = tl.program_id(0)
    matrix = find_matrix(table_ptr, matrices, tile, TILE)
    at = matrix_at(table_ptr, addresses_ptr, matrix)
    owner = field(at, OWNER)
    step_ptr = address_of(at, STEP, tl.float32, False)
    step = tl.load(step_ptr) + 1.0
    bad = 0
    if KEEP == "parameter" and SKIP_NONFINITE:
        bad = tl.load(bad_ptr + owner)
    factor = 1.0
    if WRITE and clip_rms is not None:
        factor = tl.load(clip_ptr + owner)
    total = 0.0
    if bad == 0:
        place = (tile - field(at, TILE)).to(tl.int32)
        n = field32(at, N)
        if RESIDENT:
            block = place
            first_col = 0
            end_col = n
        else:
            spans = tl.maximum((n + SPAN - 1) // SPAN, 1)
            block = place // spans
            first_col = (place % spans) * SPAN
            end_col = tl.minimum(first_col + SPAN, n)
        rate = scalar_or(lr, 0.0)
        hyper = (
            rate, rate * weight_decay, eps, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2,
            carry, gamma, clip_element,
        )  # fmt: skip
        gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        skipped, squares = _update_rows(
            at, matrix, rows, first_col, end_col, (left_ptr, right_ptr), mean_ptr, factor, step, gradient, hyper,
            PARAM, GRAD, ALIGNED, STRIDED, STOCHASTIC, SKIP_NONFINITE, MOMENTUM, SECOND, RESIDENT, KEEP, WRITE,
            PRECISION, RANK, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if WRITE:
            count_skipped(skipped_ptr, skipped)
        else:
            total = squares
    tiles = field32(at, OWNER_TILES)
    if not WRITE:
        tl.store(partial_ptr + tile, total)
    if is_last_program(counter_ptr + owner, tiles):
        if WRITE:
            if bad == 0:
                tl.store(step_ptr, step)
            else:
                count_skipped(skipped_ptr, tl.full((), 1, tl.int32))
        else:
            numel = tl.maximum(field(at, NUMEL), 1).to(tl.float32)
            square = sum_of(partial_ptr + field(at, OWNER_TILE), tiles) / numel
            # NaN stays
            excess = tl.maximum(tl.sqrt(square) / clip_rms, 1.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(clip_ptr + owner, 1.0 / excess)
            if SKIP_NONFINITE:
                if is_finite(square) == 0:
                    tl.store(bad_ptr + owner, 1)
