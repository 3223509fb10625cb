"""CAME: the phases of the residual, the one that writes the parameters, and the kernel."""

import triton
import triton.language as tl

from ...field_fragments import by_fours, column_address, field, field32, scratch, sum_groups, sum_of
from ...fragments import lerp, load_gradient, rounded, scalar_or, stream_key
from ...ticket_fragments import OWNER, PHASE, arrive, complete, find_segment, take_ticket, wait_for_earlier
from .constants import (
    APPLY,
    COL_COLUMN,
    COL_SCALE,
    COLUMNS_SIZE,
    EXP_AVG_COLUMN,
    FIELDS_SIZE,
    FULL,
    G_COLUMN,
    GROUPS,
    KEY,
    LOOK_COLUMNS,
    MATRICES,
    NEW_COL,
    NEW_ROW,
    OK,
    P_COLUMN,
    PARTIAL,
    RES_COL,
    RES_COL_COLUMN,
    RES_MEAN,
    RES_ROW,
    RES_ROW_COLUMN,
    RES_SCALE,
    RES_SUMS_START,
    RESIDUAL,
    RESIDUAL_COLUMNS,
    RESIDUAL_SUMS,
    ROW_COLUMN,
    ROW_MEAN,
    ROW_SUM,
    ROWS,
    SLAB,
    SLAB_TICKETS,
    SLAB_WIDTH,
    STEP_COLUMN,
    STEP_SIZE,
    M,
)
from .look import end_step, finish_columns, look_or_columns, sums_tile
from .moment import (
    col_scales,
    factored_scale,
    full_moment,
    keep_columns,
    row_scales,
    safe_rsqrt,
)
from .walk import matrices_of, matrix, offsets, places_in_whole, rows_of, scalar, tile, widths


@triton.jit
def _residual_tile(
    at, ticket, pointers, key, gradient, moments, weight1, weight3, eps2, PIECES: tl.constexpr,
    STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, STOCHASTIC: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """CAME's middle look. Writes m (and V), the new Rs, and over the group its sum and the column sums of (u - m)²."""
    g_ptr, row_ptr, m_ptr, res_row_ptr = pointers
    clip = scalar(at, STEP_SIZE)
    full = field32(at, FULL)
    width = widths(at, ALIGNED)
    n, m, _last = width
    size = n.to(tl.int64) * m
    first, end = matrices_of(at, ticket, GROUPS)
    group, first_row, end_row = rows_of(at, ticket)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i
        start = e.to(tl.int64) * size
        e_ptr = matrix(at, g_ptr, e, size, 1, STRIDED)
        e_group = e.to(tl.int64) * field(at, GROUPS) + group
        partial_ptr = scratch(at, PARTIAL) + e_group * 2 * m
        sum_rs = 0.0
        for row in range(first_row, end_row, BLOCK_ROWS):
            squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS // 4), tl.float32)
            row_scale = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
            if full == 0:
                _r, row_scale = row_scales(at, e, row + tl.arange(0, BLOCK_ROWS), NEW_ROW, ROW_MEAN, False)
            for col in range(0, m, BLOCK_COLS):
                rows, cols, mask = tile(row, col, width, BLOCK_ROWS, BLOCK_COLS)
                index = offsets(at, rows, cols, m, 2, STRIDED)
                g_ptrs = e_ptr + offsets(at, rows, cols, m, 1, STRIDED)
                g = load_gradient(g_ptrs, mask, gradient, SKIP_NONFINITE)
                if full == 1:
                    v, scale = full_moment(tl.load(row_ptr + index, mask=mask, other=1.0), g, moments, False)
                    tl.store(row_ptr + index, v, mask=mask)
                else:
                    col_scale = col_scales(at, e, cols, m, COL_SCALE)
                    scale = factored_scale(row_scale, col_scale, 0.0, False)
                u = clip * (g * scale)
                old_m = tl.load(m_ptr + start + index, mask=mask, other=0.0).to(tl.float32)
                new_m = lerp(old_m, u, weight1)
                row_starts = places_in_whole(at, start, e, rows, m, PIECES)[:, None]
                stored = rounded(new_m, key, row_starts, cols[None, :], STATE, STOCHASTIC)
                tl.store(m_ptr + start + index, stored, mask=mask)
                s = (u - new_m) * (u - new_m)  # outside the mask all of it is 0
                squares += by_fours(s)
                if full == 0:
                    before = (cols < m) & (row > first_row)
                    earlier = tl.load(partial_ptr + cols, mask=before, other=0.0, cache_modifier=".cg")
                    tl.store(partial_ptr + cols, earlier + tl.sum(s, 0), mask=cols < m)
            if full == 0:
                rows = row + tl.arange(0, BLOCK_ROWS)
                old_rs = tl.load(res_row_ptr + e.to(tl.int64) * n + rows, mask=rows < n, other=0.0)
                rs = lerp(old_rs, tl.sum(squares, 1) / m + eps2, weight3)
                tl.store(scratch(at, RES_ROW) + e.to(tl.int64) * n + rows, rs, mask=rows < n)
                sum_rs += tl.sum(tl.where(rows < n, rs, 0.0))
                # another thread may read the column sums for the next rows
                tl.debug_barrier()
        tl.store(scratch(at, ROW_SUM) + e_group, sum_rs)


@triton.jit
def residual_columns_tile(at, ticket, res_col_ptr, sums_ptr, weight3, eps2):
    """A slab of columns of CAME's residual, or some small matrices. Writes the new Cs and mean(Rs)."""
    n = field32(at, ROWS)
    m = field32(at, M)
    groups = field32(at, GROUPS)
    first, end = matrices_of(at, ticket, SLAB_TICKETS)
    first_col = (ticket % field32(at, SLAB_TICKETS)) * field32(at, SLAB_WIDTH)
    end_col = tl.minimum(first_col + field32(at, SLAB_WIDTH), m)
    for i in range(first, end):
        e = (tl.full((), 0, tl.int32) + i).to(tl.int64)
        if first_col == 0:
            if sums_ptr is None:
                sum_rs = sum_of(scratch(at, ROW_SUM) + e * groups, groups)
            else:
                sum_rs = tl.load(sums_ptr + field(at, RES_SUMS_START) + field(at, MATRICES) * m + e)
            tl.store(scratch(at, RES_MEAN) + e, sum_rs / n)
        partial_ptr = scratch(at, PARTIAL) + e * groups * 2 * m
        for col in range(first_col, end_col, SLAB):
            cols = col + tl.arange(0, SLAB)
            if sums_ptr is None:
                sum_s, _none = sum_groups(partial_ptr, groups, 2 * m, cols, m, SLAB, False)
            else:
                sum_s = tl.load(sums_ptr + field(at, RES_SUMS_START) + e * m + cols, mask=cols < m, other=0.0)
            old_c = tl.load(res_col_ptr + e * m + cols, mask=cols < m, other=0.0)
            c = lerp(old_c, sum_s / n + eps2, weight3)
            tl.store(scratch(at, RES_COL) + e * m + cols, c, mask=cols < m)
            tl.store(scratch(at, RES_SCALE) + e * m + cols, safe_rsqrt(c, False), mask=cols < m)


@triton.jit
def _confident_tile(
    at, ticket, pointers, key, lr, decay, PIECES: tl.constexpr,
    PARAM: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """CAME's last look, at m. Writes p and the four factors."""
    p_ptr, row_ptr, col_ptr, m_ptr, res_row_ptr, res_col_ptr = pointers
    full = field32(at, FULL)
    width = widths(at, ALIGNED)
    n, m, _last = width
    size = n.to(tl.int64) * m
    first, end = matrices_of(at, ticket, GROUPS)
    _group, first_row, end_row = rows_of(at, ticket)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i
        start = e.to(tl.int64) * size
        e_ptr = matrix(at, p_ptr, e, size, 0, STRIDED)
        e_n = e.to(tl.int64) * n
        if (first_row == 0) & (full == 0):
            keep_columns(at, e, m, col_ptr, NEW_COL, BLOCK_COLS)
            keep_columns(at, e, m, res_col_ptr, RES_COL, BLOCK_COLS)
        for row in range(first_row, end_row, BLOCK_ROWS):
            row_scale = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
            if full == 0:
                rows = row + tl.arange(0, BLOCK_ROWS)
                rs, row_scale = row_scales(at, e, rows, RES_ROW, RES_MEAN, False)
                r = tl.load(scratch(at, NEW_ROW) + e_n + rows, mask=rows < n, other=0.0, cache_modifier=".cg")
                tl.store(res_row_ptr + e_n + rows, rs, mask=rows < n)
                tl.store(row_ptr + e_n + rows, r, mask=rows < n)
            for col in range(0, m, BLOCK_COLS):
                rows, cols, mask = tile(row, col, width, BLOCK_ROWS, BLOCK_COLS)
                index = offsets(at, rows, cols, m, 2, STRIDED)
                p_ptrs = e_ptr + offsets(at, rows, cols, m, 0, STRIDED)
                p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
                # written by other programs of this launch, as all that is read with this modifier
                m_ptrs = m_ptr + start + index
                update = tl.load(m_ptrs, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
                if full == 0:
                    col_scale = col_scales(at, e, cols, m, RES_SCALE)
                    update *= factored_scale(row_scale, col_scale, 0.0, False)
                row_starts = places_in_whole(at, start, e, rows, m, PIECES)[:, None]
                new_p = rounded(p - (lr * update + decay * p), key, row_starts, cols[None, :], PARAM, STOCHASTIC)
                tl.store(p_ptrs, new_p, mask=mask)


@triton.jit(do_not_specialize=["segments_start", "rows_start", "first_ticket", "owners", "counters"])
def _confidence_kernel(
    table_ptr, addresses_ptr, scratch_ptr, counters_ptr, sums_ptr, skipped_ptr, found_inf,
    segments_start, rows_start, first_ticket, owners, counters,
    lr, weight_decay, one_minus_beta1, one_minus_beta2, one_minus_beta3, eps1, eps2, clip_threshold,
    scale, inv_scale, clip_value, clip_coef,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """CAME. One program takes one ticket and writes what the tile function of its phase says.

    The last program of a phase of a parameter writes what the next one needs of the whole parameter; of the apply
    phase, the step.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    segment_ptr, ticket = find_segment(table_ptr, segments_start, take_ticket(counters_ptr, first_ticket))
    k = tl.load(segment_ptr + OWNER)
    phase = tl.load(segment_ptr + PHASE).to(tl.int32)
    at = (table_ptr, table_ptr + rows_start + k * FIELDS_SIZE, scratch_ptr)
    address_ptr = addresses_ptr + k * COLUMNS_SIZE

    step = tl.load(column_address(address_ptr, STEP_COLUMN, tl.float32, False)) + 1.0
    moments = (one_minus_beta2, eps1)
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))
    rate = scalar_or(lr, 0.0)
    row_factor_ptr = column_address(address_ptr, ROW_COLUMN, tl.float32, ALIGNED)
    m_ptr = column_address(address_ptr, EXP_AVG_COLUMN, STATE, ALIGNED)
    res_row_ptr = column_address(address_ptr, RES_ROW_COLUMN, tl.float32, False)
    res_col_ptr = column_address(address_ptr, RES_COL_COLUMN, tl.float32, False)

    wait_for_earlier(counters_ptr, segment_ptr)
    if phase <= LOOK_COLUMNS:
        look_or_columns(
            at, phase, ticket, address_ptr, None, sums_ptr, gradient, moments,
            PARAM, GRAD, ALIGNED, STRIDED, SKIP_NONFINITE, False, False, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
    else:
        if scalar(at, OK) == 1.0:
            if phase == RESIDUAL:
                pointers = (column_address(address_ptr, G_COLUMN, GRAD, ALIGNED), row_factor_ptr, m_ptr, res_row_ptr)
                _residual_tile(
                    at, ticket, pointers, stream_key(field(at, KEY), step, 1), gradient, moments,
                    one_minus_beta1, one_minus_beta3, eps2, sums_ptr is not None,
                    STATE, ALIGNED, STRIDED, STOCHASTIC, SKIP_NONFINITE, BLOCK_ROWS, BLOCK_COLS,
                )  # fmt: skip
            if sums_ptr is not None:
                if phase == RESIDUAL_SUMS:
                    sums_tile(at, ticket, sums_ptr + field(at, RES_SUMS_START), False)
            if phase == RESIDUAL_COLUMNS:
                residual_columns_tile(at, ticket, res_col_ptr, sums_ptr, one_minus_beta3, eps2)
            if phase == APPLY:
                col_ptr = column_address(address_ptr, COL_COLUMN, tl.float32, False)
                p_ptr = column_address(address_ptr, P_COLUMN, PARAM, ALIGNED)
                pointers = (p_ptr, row_factor_ptr, col_ptr, m_ptr, res_row_ptr, res_col_ptr)
                _confident_tile(
                    at, ticket, pointers, stream_key(field(at, KEY), step, 0), rate, rate * weight_decay,
                    sums_ptr is not None, PARAM, ALIGNED, STRIDED, STOCHASTIC, BLOCK_ROWS, BLOCK_COLS,
                )  # fmt: skip

    if arrive(counters_ptr, segment_ptr):
        if phase == LOOK_COLUMNS:
            # the step size is then the clip alone
            finish_columns(
                at, step, None, sums_ptr, (1.0, 0.0, clip_threshold, 0.0),
                False, "constant", False, False, SKIP_NONFINITE,
            )  # fmt: skip
        if phase == APPLY:
            end_step(at, address_ptr, step, skipped_ptr)
        complete(counters_ptr, segment_ptr, owners, counters)
