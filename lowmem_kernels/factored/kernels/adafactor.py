"""Adafactor: the phase that writes the parameters, and the kernel."""

import triton
import triton.language as tl

from ...field_fragments import by_fours, column_address, field, field32, scratch, sum_of
from ...fragments import lerp, load_gradient, rounded, scalar_or, stream_key
from ...ticket_fragments import OWNER, PHASE, arrive, complete, find_segment, take_ticket, wait_for_earlier
from .constants import (
    APPLY,
    COL_COLUMN,
    COL_SCALE,
    COLUMNS_SIZE,
    DECAY,
    EXP_AVG_COLUMN,
    FELT,
    FIELDS_SIZE,
    FLOOR,
    FULL,
    G_COLUMN,
    GROUPS,
    KEY,
    LOOK_COLUMNS,
    LOOK_SUMS,
    NEW_COL,
    NEW_ROW,
    OK,
    P_COLUMN,
    PARAM_SUM,
    PARAM_SUM_COLUMN,
    ROW_COLUMN,
    ROW_MEAN,
    STEP_COLUMN,
    STEP_SIZE,
    TICKETS,
    UPDATE_SUM,
)
from .look import end_step, finish, finish_columns, floor_tile, look_or_columns, write_param_sum
from .moment import col_scales, factored_scale, full_moment, keep_columns, row_scales, weight_of
from .walk import matrices_of, matrix, offsets, places_in_whole, rows_of, scalar, tile, widths


@triton.jit
def _apply_tile(
    at, ticket, pointers, param_sum_ptr, keys, gradient, moments, one_minus_beta1, PIECES: tl.constexpr,
    PARAM: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr, EPS_FLOOR: tl.constexpr, MOMENTUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Second look at a ticket's rows. Writes p, m, R or V, and in the first group of a matrix C."""
    p_ptr, g_ptr, row_ptr, col_ptr, m_ptr = pointers
    key_p, key_m = keys
    _unused, eps = moments
    step_size = scalar(at, STEP_SIZE)
    decay = scalar(at, DECAY)
    full = field(at, FULL)
    width = widths(at, ALIGNED)
    n, m, _last = width
    size = n.to(tl.int64) * m
    first, end = matrices_of(at, ticket, GROUPS)
    _group, first_row, end_row = rows_of(at, ticket)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS // 4), tl.float32)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i
        start = e.to(tl.int64) * size
        e_p_ptr = matrix(at, p_ptr, e, size, 0, STRIDED)
        e_g_ptr = matrix(at, g_ptr, e, size, 1, STRIDED)
        if (first_row == 0) & (full == 0):
            keep_columns(at, e, m, col_ptr, NEW_COL, BLOCK_COLS)
        for row in range(first_row, end_row, BLOCK_ROWS):
            row_scale = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
            if full == 0:
                rows = row + tl.arange(0, BLOCK_ROWS)
                r, row_scale = row_scales(at, e, rows, NEW_ROW, ROW_MEAN, EPS_FLOOR)
                tl.store(row_ptr + e.to(tl.int64) * n + rows, r, mask=rows < n)
            for col in range(0, m, BLOCK_COLS):
                rows, cols, mask = tile(row, col, width, BLOCK_ROWS, BLOCK_COLS)
                index = offsets(at, rows, cols, m, 2, STRIDED)
                g_ptrs = e_g_ptr + offsets(at, rows, cols, m, 1, STRIDED)
                p_ptrs = e_p_ptr + offsets(at, rows, cols, m, 0, STRIDED)
                g = load_gradient(g_ptrs, mask, gradient, SKIP_NONFINITE)
                p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
                if full == 1:
                    v, scale = full_moment(tl.load(row_ptr + index, mask=mask, other=1.0), g, moments, EPS_FLOOR)
                    tl.store(row_ptr + index, v, mask=mask)
                else:
                    col_scale = col_scales(at, e, cols, m, COL_SCALE)
                    scale = factored_scale(row_scale, col_scale, eps, EPS_FLOOR)
                update = step_size * (g * scale)
                row_starts = places_in_whole(at, start, e, rows, m, PIECES)[:, None]
                if MOMENTUM:
                    m_ptrs = m_ptr + start + index
                    old_m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
                    update = lerp(old_m, update, one_minus_beta1)
                    tl.store(m_ptrs, rounded(update, key_m, row_starts, cols[None, :], STATE, STOCHASTIC), mask=mask)
                new_p = rounded(p - (update + decay * p), key_p, row_starts, cols[None, :], PARAM, STOCHASTIC)
                tl.store(p_ptrs, new_p, mask=mask)
                if param_sum_ptr is not None:
                    # as it is stored; outside the mask all of it is 0
                    p = new_p.to(tl.float32)
                    squares += by_fours(p * p)
    if param_sum_ptr is not None:
        tl.store(scratch(at, PARAM_SUM) + ticket, tl.sum(squares))


@triton.jit(do_not_specialize=["segments_start", "rows_start", "first_ticket", "owners", "counters"])
def _factored_kernel(
    table_ptr, addresses_ptr, scratch_ptr, counters_ptr, sums_ptr, skipped_ptr, found_inf,
    segments_start, rows_start, first_ticket, owners, counters,
    lr, weight_decay, beta2_weight, decay_rate, eps1, eps2, clip_threshold, one_minus_beta1,
    scale, inv_scale, clip_value, clip_coef,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr, EPS_FLOOR: tl.constexpr, SCHEDULE: tl.constexpr,
    SCALE_PARAMETER: tl.constexpr, SCALE_DECAY: tl.constexpr, MOMENTUM: tl.constexpr, CARRY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Adafactor. One program takes one ticket and writes what the tile function of its phase says.

    The last program of a phase of a parameter writes what the next one needs of the whole parameter; of the apply
    phase, the step and the sum of p².
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    segment_ptr, ticket = find_segment(table_ptr, segments_start, take_ticket(counters_ptr, first_ticket))
    k = tl.load(segment_ptr + OWNER)
    phase = tl.load(segment_ptr + PHASE).to(tl.int32)
    at = (table_ptr, table_ptr + rows_start + k * FIELDS_SIZE, scratch_ptr)
    address_ptr = addresses_ptr + k * COLUMNS_SIZE
    param_sum_ptr = column_address(address_ptr, PARAM_SUM_COLUMN, tl.float32, False) if CARRY else None

    step = tl.load(column_address(address_ptr, STEP_COLUMN, tl.float32, False)) + 1.0
    moments = (weight_of(step, beta2_weight, decay_rate), eps1)
    hyper = (scalar_or(lr, 0.0), weight_decay, clip_threshold, eps2)
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))
    g_ptr = column_address(address_ptr, G_COLUMN, GRAD, ALIGNED)

    wait_for_earlier(counters_ptr, segment_ptr)
    if phase <= LOOK_COLUMNS:
        look_or_columns(
            at, phase, ticket, address_ptr, param_sum_ptr, sums_ptr, gradient, moments,
            PARAM, GRAD, ALIGNED, STRIDED, SKIP_NONFINITE, EPS_FLOOR, SCALE_PARAMETER, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
    if EPS_FLOOR:
        if phase == FLOOR:
            if scalar(at, FELT) > 0.0:
                floor_tile(at, ticket, g_ptr, gradient, eps1, ALIGNED, STRIDED, SKIP_NONFINITE, BLOCK_ROWS, BLOCK_COLS)
    if phase == APPLY:
        if scalar(at, OK) == 1.0:
            pointers = (
                column_address(address_ptr, P_COLUMN, PARAM, ALIGNED),
                g_ptr,
                column_address(address_ptr, ROW_COLUMN, tl.float32, ALIGNED),
                column_address(address_ptr, COL_COLUMN, tl.float32, False),
                column_address(address_ptr, EXP_AVG_COLUMN, STATE, ALIGNED),
            )
            key = field(at, KEY)
            keys = (stream_key(key, step, 0), stream_key(key, step, 1))
            _apply_tile(
                at, ticket, pointers, param_sum_ptr, keys, gradient, moments, one_minus_beta1, sums_ptr is not None,
                PARAM, STATE, ALIGNED, STRIDED, STOCHASTIC, SKIP_NONFINITE, EPS_FLOOR, MOMENTUM, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip

    if arrive(counters_ptr, segment_ptr):
        if SCALE_PARAMETER and sums_ptr is not None:
            if phase == LOOK_SUMS:
                write_param_sum(at, param_sum_ptr, sums_ptr)
        if phase == LOOK_COLUMNS:
            finish_columns(
                at, step, param_sum_ptr, sums_ptr, hyper,
                EPS_FLOOR, SCHEDULE, SCALE_PARAMETER, SCALE_DECAY, SKIP_NONFINITE,
            )  # fmt: skip
        if EPS_FLOOR:
            if phase == FLOOR:
                if scalar(at, FELT) > 0.0:
                    squares = sum_of(scratch(at, UPDATE_SUM), field32(at, TICKETS))
                    finish(
                        at, squares, step, param_sum_ptr, hyper, SCHEDULE, SCALE_PARAMETER, SCALE_DECAY, SKIP_NONFINITE
                    )
        if phase == APPLY:
            end_step(at, address_ptr, step, skipped_ptr)
            if CARRY:
                if scalar(at, OK) == 1.0:
                    tl.store(param_sum_ptr, sum_of(scratch(at, PARAM_SUM), field32(at, TICKETS)))
        complete(counters_ptr, segment_ptr, owners, counters)
