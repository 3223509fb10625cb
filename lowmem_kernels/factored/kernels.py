"""Triton kernels of the factored family. README.md beside this file has the picture and the bytes.

A kernel works through tickets: pieces of phases of parameters. Each launch takes the tickets of one phase.
"""

import triton
import triton.language as tl

from ..fragments import count_skipped, is_finite, is_last_program, lerp, rounded, scalar_or, stream_key
from .fields import FIELDS
from .tiles import (
    COL_TICKETS,
    FLOORED,
    FULL,
    GROUPS,
    KEY,
    NEW_COL,
    NEW_PARAM_SUM,
    NEW_ROW,
    NUMEL,
    PARAM_SUM,
    PARTIAL,
    RES_COL,
    RES_MEAN,
    RES_ROW,
    ROW_MEAN,
    ROW_SUM,
    SCALARS,
    TICKETS,
    UPDATE_SUM,
    UPDATE_SUMS,
    N,
    col_scales,
    columns_tile,
    factored_scale,
    field,
    field32,
    full_moment,
    load_gradient,
    look_factored_tile,
    look_full_tile,
    matrices_of,
    matrix,
    offsets,
    residual_columns_tile,
    row_scales,
    rows_of,
    scratch,
    sum_of,
    sum_squares_tile,
    tile,
    widths,
)

# phases of both kernels, in order
PHASES = ("look", "columns", "floor", "residual", "residual_columns", "apply")
_LOOK, _COLUMNS, _FLOOR, _RESIDUAL, _RESIDUAL_COLUMNS, _APPLY = [tl.constexpr(i) for i in range(len(PHASES))]

# a parameter's scalars in the scratch: 1 where it is to be updated; what multiplies g / sqrt(V); what multiplies p; the
# sum of p² that the step used; 1 where the floor under V is felt
SCALARS_SIZE = 5
_OK, _STEP_SIZE, _DECAY, _USED_SUM, _FELT = [tl.constexpr(i) for i in range(SCALARS_SIZE)]

# counters of finished programs of a parameter, one for each phase that ends with something to be done once
COUNTERS = 3
_COLUMNS_DONE, _FLOOR_DONE, _APPLY_DONE = [tl.constexpr(i) for i in range(COUNTERS)]
_COUNTERS = tl.constexpr(COUNTERS)

# columns of the addresses of a parameter
COLUMNS = ("param", "grad", "row", "col", "step", "exp_avg", "param_sum", "res_row", "res_col")
_P, _G, _ROW, _COL, _STEP, _EXP_AVG, _CARRIED, _RES_ROW, _RES_COL = [tl.constexpr(i) for i in range(len(COLUMNS))]
_COLUMNS_SIZE = tl.constexpr(len(COLUMNS))
_FIELDS_SIZE = tl.constexpr(len(FIELDS))

# a segment of the ticket list: (first ticket, parameter, phase)
_SEGMENT = tl.constexpr(3)


@triton.jit
def _find_segment(table_ptr, first, end, ticket):
    """The segment of the ticket list, (first ticket, parameter, phase), that a ticket is in: by bisection."""
    low = first
    high = end
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table_ptr + middle.to(tl.int64) * _SEGMENT) <= ticket:
            low = middle
        else:
            high = middle
    segment_ptr = table_ptr + low.to(tl.int64) * _SEGMENT
    return (
        ticket - tl.load(segment_ptr).to(tl.int32),
        tl.load(segment_ptr + 1).to(tl.int32),
        tl.load(segment_ptr + 2).to(tl.int32),
    )


@triton.jit
def _weight(step, beta2_weight, decay_rate):
    """Weight of the new value in the second moment: constant, or step**decay_rate."""
    if beta2_weight is not None:
        return beta2_weight
    else:
        # fp64, for one number: in fp32 the exponential of a product is off by 1e-6 of itself
        return tl.exp(decay_rate * tl.log(step.to(tl.float64))).to(tl.float32)


@triton.jit
def _carried(param_sum_ptr):
    """The sum of p² that an earlier step left, NaN where there is none."""
    if param_sum_ptr is None:
        return float("nan")
    else:
        return tl.load(param_sum_ptr)


@triton.jit
def _address(address_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer in a column of the parameter's addresses, see fragments.address."""
    pointer = tl.load(address_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _finish(
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
        used_sum = _carried(param_sum_ptr)
        if used_sum != used_sum:
            used_sum = sum_of(scratch(at, PARAM_SUM), field32(at, TICKETS))
        tl.store(scratch(at, SCALARS) + _USED_SUM, used_sum)
        rate *= tl.maximum(eps2, tl.sqrt(used_sum / numel))
    if SCALE_DECAY:
        decay = rate * weight_decay
    else:
        decay = lr * weight_decay
    step_size = rate / tl.maximum(1.0, tl.sqrt(squares / numel) / clip_threshold, propagate_nan=tl.PropagateNan.ALL)
    scalars_ptr = scratch(at, SCALARS)
    tl.store(scalars_ptr + _STEP_SIZE, step_size)
    tl.store(scalars_ptr + _DECAY, decay)
    if SKIP_NONFINITE:
        tl.store(scalars_ptr + _OK, tl.where(is_finite(squares), 1.0, 0.0))
    else:
        tl.store(scalars_ptr + _OK, 1.0)


@triton.jit
def _look_and_columns(
    at, phase, ticket, counter_ptr, address_ptr, param_sum_ptr, step, gradient, moments, hyper,
    PARAM: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr, EPS_FLOOR: tl.constexpr, SCHEDULE: tl.constexpr, SCALE_PARAMETER: tl.constexpr,
    SCALE_DECAY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The two phases that all rules begin with: the sums over g, then the column factor and the scalars."""
    g_ptr = _address(address_ptr, _G, GRAD, ALIGNED)
    row_ptr = _address(address_ptr, _ROW, tl.float32, ALIGNED)
    if phase == _LOOK:
        if SCALE_PARAMETER:
            carried = _carried(param_sum_ptr)
            if carried != carried:
                p_ptr = _address(address_ptr, _P, PARAM, ALIGNED)
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
    if phase == _COLUMNS:
        if field(at, FULL) == 0:
            col_ptr = _address(address_ptr, _COL, tl.float32, False)
            columns_tile(at, ticket, col_ptr, moments, EPS_FLOOR)
        # the last slab of a parameter has all sums of u²
        if is_last_program(counter_ptr + _COLUMNS_DONE, field32(at, COL_TICKETS)):
            squares = sum_of(scratch(at, UPDATE_SUM), field32(at, UPDATE_SUMS))
            _finish(at, squares, step, param_sum_ptr, hyper, SCHEDULE, SCALE_PARAMETER, SCALE_DECAY, SKIP_NONFINITE)
            if EPS_FLOOR:
                felt = 0.0
                if field(at, FULL) == 0:
                    felt = sum_of(scratch(at, FLOORED), field32(at, COL_TICKETS))
                tl.store(scratch(at, SCALARS) + _FELT, felt)


@triton.jit
def _floor_tile(
    at, ticket, g_ptr, gradient, eps,
    ALIGNED: tl.constexpr, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Another look at g where the floor under V is felt, since then the column sums do not tell the sum of u²."""
    first, end = matrices_of(at, ticket, GROUPS)
    _, first_row, end_row = rows_of(at, ticket)
    m, limit = widths(at, ALIGNED)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i
        e_ptr = matrix(at, g_ptr, e, 1, STRIDED)
        for row in range(first_row, end_row, BLOCK_ROWS):
            _, row_scale = row_scales(at, e, row + tl.arange(0, BLOCK_ROWS), NEW_ROW, ROW_MEAN)
            for col in range(0, m, BLOCK_COLS):
                rows, cols, index, mask = tile(at, row, col, m, limit, BLOCK_ROWS, BLOCK_COLS)
                _, col_scale = col_scales(at, e, cols, m, NEW_COL)
                pointers = e_ptr + offsets(at, rows, cols, index, 1, STRIDED)
                g = load_gradient(pointers, mask, gradient, SKIP_NONFINITE)
                u = g * factored_scale(row_scale, col_scale, eps, True)
                squares += u * u
    tl.store(scratch(at, UPDATE_SUM) + ticket, tl.sum(squares))


@triton.jit
def _apply_tile(
    at, ticket, pointers, param_sum_ptr, keys, gradient, moments, one_minus_beta1,
    PARAM: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr, EPS_FLOOR: tl.constexpr, MOMENTUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Second look at a ticket's rows. Writes p, m, R or V, and in the first group of a matrix C."""
    p_ptr, g_ptr, row_ptr, col_ptr, m_ptr = pointers
    key_p, key_m = keys
    _, eps = moments
    step_size = tl.load(scratch(at, SCALARS) + _STEP_SIZE, cache_modifier=".cg")
    decay = tl.load(scratch(at, SCALARS) + _DECAY, cache_modifier=".cg")
    full = field(at, FULL)
    n = field32(at, N)
    m, limit = widths(at, ALIGNED)
    first, end = matrices_of(at, ticket, GROUPS)
    _, first_row, end_row = rows_of(at, ticket)
    old_squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    new_squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i
        start = e.to(tl.int64) * limit
        e_p_ptr = matrix(at, p_ptr, e, 0, STRIDED)
        e_g_ptr = matrix(at, g_ptr, e, 1, STRIDED)
        for row in range(first_row, end_row, BLOCK_ROWS):
            row_scale = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
            if full == 0:
                rows = row + tl.arange(0, BLOCK_ROWS)
                r, row_scale = row_scales(at, e, rows, NEW_ROW, ROW_MEAN)
                tl.store(row_ptr + e.to(tl.int64) * n + rows, r, mask=rows < n)
            for col in range(0, m, BLOCK_COLS):
                rows, cols, index, mask = tile(at, row, col, m, limit, BLOCK_ROWS, BLOCK_COLS)
                g_ptrs = e_g_ptr + offsets(at, rows, cols, index, 1, STRIDED)
                p_ptrs = e_p_ptr + offsets(at, rows, cols, index, 0, STRIDED)
                g = load_gradient(g_ptrs, mask, gradient, SKIP_NONFINITE)
                p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
                if full == 1:
                    v, scale = full_moment(tl.load(row_ptr + index, mask=mask, other=1.0), g, moments, EPS_FLOOR)
                    tl.store(row_ptr + index, v, mask=mask)
                else:
                    c, col_scale = col_scales(at, e, cols, m, NEW_COL)
                    tl.store(col_ptr + e.to(tl.int64) * m + cols, c, mask=(cols < m) & (row == 0))
                    scale = factored_scale(row_scale, col_scale, eps, EPS_FLOOR)
                update = step_size * (g * scale)
                row_starts = start + rows.to(tl.int64)[:, None] * m
                if MOMENTUM:
                    m_ptrs = m_ptr + start + index
                    old_m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
                    update = lerp(old_m, update, one_minus_beta1)
                    tl.store(m_ptrs, rounded(update, key_m, row_starts, cols[None, :], STATE, STOCHASTIC), mask=mask)
                new_p = rounded(p - (update + decay * p), key_p, row_starts, cols[None, :], PARAM, STOCHASTIC)
                tl.store(p_ptrs, new_p, mask=mask)
                if param_sum_ptr is not None:
                    old_squares += p * p
                    stored = tl.where(mask, new_p.to(tl.float32), 0.0)
                    new_squares += stored * stored
    if param_sum_ptr is not None:
        tl.store(scratch(at, PARAM_SUM) + ticket, tl.sum(old_squares))
        tl.store(scratch(at, NEW_PARAM_SUM) + ticket, tl.sum(new_squares))


@triton.jit
def _end_step(at, counter_ptr, address_ptr, step, skipped_ptr):
    """True in the last program of a parameter's apply phase, which has advanced the step or counted the parameter."""
    last = is_last_program(counter_ptr + _APPLY_DONE, field32(at, TICKETS))
    if last:
        if tl.load(scratch(at, SCALARS) + _OK, cache_modifier=".cg") == 1.0:
            tl.store(_address(address_ptr, _STEP, tl.float32, False), step)
        else:
            count_skipped(skipped_ptr, tl.full((), 1, tl.int32))
    return last


@triton.jit(do_not_specialize=["rows_start", "segment", "segments", "ticket"])
def _factored_kernel(
    table_ptr, addresses_ptr, scratch_ptr, counters_ptr, skipped_ptr, found_inf, rows_start, segment, segments, ticket,
    lr, weight_decay, beta2_weight, decay_rate, eps1, eps2, clip_threshold, one_minus_beta1,
    scale, inv_scale, clip_value, clip_coef,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr, EPS_FLOOR: tl.constexpr, SCHEDULE: tl.constexpr,
    SCALE_PARAMETER: tl.constexpr, SCALE_DECAY: tl.constexpr, MOMENTUM: tl.constexpr, CARRY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Adafactor. One program owns one ticket and writes what the tile function of its phase says.

    The last program of a parameter's apply phase advances its step and leaves the sum of p² for the next one.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    ticket, k, phase = _find_segment(table_ptr, segment, segment + segments, ticket + tl.program_id(0))
    row_ptr = table_ptr + rows_start + k.to(tl.int64) * _FIELDS_SIZE
    address_ptr = addresses_ptr + k.to(tl.int64) * _COLUMNS_SIZE
    counter_ptr = counters_ptr + k * _COUNTERS
    at = (table_ptr, row_ptr, scratch_ptr)
    param_sum_ptr = _address(address_ptr, _CARRIED, tl.float32, False) if CARRY else None

    step = tl.load(_address(address_ptr, _STEP, tl.float32, False)) + 1.0
    moments = (_weight(step, beta2_weight, decay_rate), eps1)
    hyper = (scalar_or(lr, 0.0), weight_decay, clip_threshold, eps2)
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))
    g_ptr = _address(address_ptr, _G, GRAD, ALIGNED)
    if phase <= _COLUMNS:
        _look_and_columns(
            at, phase, ticket, counter_ptr, address_ptr, param_sum_ptr, step, gradient, moments, hyper,
            PARAM, GRAD, ALIGNED, STRIDED, SKIP_NONFINITE, EPS_FLOOR, SCHEDULE, SCALE_PARAMETER, SCALE_DECAY,
            BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
    if EPS_FLOOR:
        if phase == _FLOOR:
            if tl.load(scratch(at, SCALARS) + _FELT, cache_modifier=".cg") != 0.0:
                _floor_tile(at, ticket, g_ptr, gradient, eps1, ALIGNED, STRIDED, SKIP_NONFINITE, BLOCK_ROWS, BLOCK_COLS)
                if is_last_program(counter_ptr + _FLOOR_DONE, field32(at, TICKETS)):
                    squares = sum_of(scratch(at, UPDATE_SUM), field32(at, TICKETS))
                    _finish(
                        at, squares, step, param_sum_ptr, hyper, SCHEDULE, SCALE_PARAMETER, SCALE_DECAY, SKIP_NONFINITE
                    )
    if phase == _APPLY:
        ok = tl.load(scratch(at, SCALARS) + _OK, cache_modifier=".cg") == 1.0
        if ok:
            pointers = (
                _address(address_ptr, _P, PARAM, ALIGNED),
                g_ptr,
                _address(address_ptr, _ROW, tl.float32, ALIGNED),
                _address(address_ptr, _COL, tl.float32, False),
                _address(address_ptr, _EXP_AVG, STATE, ALIGNED),
            )
            key = field(at, KEY)
            keys = (stream_key(key, step, 0), stream_key(key, step, 1))
            _apply_tile(
                at, ticket, pointers, param_sum_ptr, keys, gradient, moments, one_minus_beta1,
                PARAM, STATE, ALIGNED, STRIDED, STOCHASTIC, SKIP_NONFINITE, EPS_FLOOR, MOMENTUM, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip
        last = _end_step(at, counter_ptr, address_ptr, step, skipped_ptr)
        if CARRY:
            if last & ok:
                tickets = field32(at, TICKETS)
                # p as it was has been summed again: whoever changed it unseen has changed its sum
                seen = sum_of(scratch(at, PARAM_SUM), tickets) == tl.load(scratch(at, SCALARS) + _USED_SUM)
                new_sum = sum_of(scratch(at, NEW_PARAM_SUM), tickets)
                tl.store(param_sum_ptr, tl.where(seen, new_sum, float("nan")))


@triton.jit
def _residual_tile(
    at, ticket, pointers, key, gradient, moments, weight1, weight3, eps2,
    STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, STOCHASTIC: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """CAME's middle look. Writes m, or m and V; the new Rs, and over the group its sum and the column sums of (u - m)²."""
    g_ptr, row_ptr, m_ptr, res_row_ptr = pointers
    clip = tl.load(scratch(at, SCALARS) + _STEP_SIZE, cache_modifier=".cg")
    full = field32(at, FULL)
    n = field32(at, N)
    m, limit = widths(at, ALIGNED)
    first, end = matrices_of(at, ticket, GROUPS)
    group, first_row, end_row = rows_of(at, ticket)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i
        start = e.to(tl.int64) * limit
        e_ptr = matrix(at, g_ptr, e, 1, STRIDED)
        e_group = e.to(tl.int64) * field(at, GROUPS) + group
        partial_ptr = scratch(at, PARTIAL) + e_group * 2 * m
        sum_rs = 0.0
        for row in range(first_row, end_row, BLOCK_ROWS):
            squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
            row_scale = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
            if full == 0:
                _, row_scale = row_scales(at, e, row + tl.arange(0, BLOCK_ROWS), NEW_ROW, ROW_MEAN)
            for col in range(0, m, BLOCK_COLS):
                rows, cols, index, mask = tile(at, row, col, m, limit, BLOCK_ROWS, BLOCK_COLS)
                pointers = e_ptr + offsets(at, rows, cols, index, 1, STRIDED)
                g = load_gradient(pointers, mask, gradient, SKIP_NONFINITE)
                if full == 1:
                    v, scale = full_moment(tl.load(row_ptr + index, mask=mask, other=1.0), g, moments, False)
                    tl.store(row_ptr + index, v, mask=mask)
                else:
                    _, col_scale = col_scales(at, e, cols, m, NEW_COL)
                    scale = factored_scale(row_scale, col_scale, 0.0, False)
                u = clip * (g * scale)
                old_m = tl.load(m_ptr + start + index, mask=mask, other=0.0).to(tl.float32)
                new_m = lerp(old_m, u, weight1)
                row_starts = start + rows.to(tl.int64)[:, None] * m
                stored = rounded(new_m, key, row_starts, cols[None, :], STATE, STOCHASTIC)
                tl.store(m_ptr + start + index, stored, mask=mask)
                s = tl.where(mask, (u - new_m) * (u - new_m), 0.0)
                squares += s
                if full == 0:
                    earlier = tl.load(partial_ptr + cols, mask=(cols < m) & (row > first_row), other=0.0)
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
def _confident_tile(
    at, ticket, pointers, key, lr, decay,
    PARAM: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """CAME's last look, at m. Writes p and the four factors."""
    p_ptr, row_ptr, col_ptr, m_ptr, res_row_ptr, res_col_ptr = pointers
    full = field32(at, FULL)
    n = field32(at, N)
    m, limit = widths(at, ALIGNED)
    first, end = matrices_of(at, ticket, GROUPS)
    _, first_row, end_row = rows_of(at, ticket)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i
        start = e.to(tl.int64) * limit
        e_ptr = matrix(at, p_ptr, e, 0, STRIDED)
        e_n = e.to(tl.int64) * n
        e_m = e.to(tl.int64) * m
        for row in range(first_row, end_row, BLOCK_ROWS):
            row_scale = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
            if full == 0:
                rows = row + tl.arange(0, BLOCK_ROWS)
                rs, row_scale = row_scales(at, e, rows, RES_ROW, RES_MEAN)
                r = tl.load(scratch(at, NEW_ROW) + e_n + rows, mask=rows < n, other=0.0)
                tl.store(res_row_ptr + e_n + rows, rs, mask=rows < n)
                tl.store(row_ptr + e_n + rows, r, mask=rows < n)
            for col in range(0, m, BLOCK_COLS):
                rows, cols, index, mask = tile(at, row, col, m, limit, BLOCK_ROWS, BLOCK_COLS)
                p_ptrs = e_ptr + offsets(at, rows, cols, index, 0, STRIDED)
                p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
                update = tl.load(m_ptr + start + index, mask=mask, other=0.0).to(tl.float32)
                if full == 0:
                    cs, col_scale = col_scales(at, e, cols, m, RES_COL)
                    c = tl.load(scratch(at, NEW_COL) + e_m + cols, mask=cols < m, other=0.0)
                    first_row_only = (cols < m) & (row == 0)
                    tl.store(res_col_ptr + e_m + cols, cs, mask=first_row_only)
                    tl.store(col_ptr + e_m + cols, c, mask=first_row_only)
                    update *= factored_scale(row_scale, col_scale, 0.0, False)
                row_starts = start + rows.to(tl.int64)[:, None] * m
                new_p = rounded(p - (lr * update + decay * p), key, row_starts, cols[None, :], PARAM, STOCHASTIC)
                tl.store(p_ptrs, new_p, mask=mask)


@triton.jit(do_not_specialize=["rows_start", "segment", "segments", "ticket"])
def _confidence_kernel(
    table_ptr, addresses_ptr, scratch_ptr, counters_ptr, skipped_ptr, found_inf, rows_start, segment, segments, ticket,
    lr, weight_decay, one_minus_beta1, one_minus_beta2, one_minus_beta3, eps1, eps2, clip_threshold,
    scale, inv_scale, clip_value, clip_coef,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """CAME. One program owns one ticket and writes what the tile function of its phase says.

    The last program of a parameter's apply phase advances its step.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    ticket, k, phase = _find_segment(table_ptr, segment, segment + segments, ticket + tl.program_id(0))
    row_ptr = table_ptr + rows_start + k.to(tl.int64) * _FIELDS_SIZE
    address_ptr = addresses_ptr + k.to(tl.int64) * _COLUMNS_SIZE
    counter_ptr = counters_ptr + k * _COUNTERS
    at = (table_ptr, row_ptr, scratch_ptr)

    step = tl.load(_address(address_ptr, _STEP, tl.float32, False)) + 1.0
    moments = (one_minus_beta2, eps1)
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))
    rate = scalar_or(lr, 0.0)
    row_factor_ptr = _address(address_ptr, _ROW, tl.float32, ALIGNED)
    m_ptr = _address(address_ptr, _EXP_AVG, STATE, ALIGNED)
    res_row_ptr = _address(address_ptr, _RES_ROW, tl.float32, False)
    res_col_ptr = _address(address_ptr, _RES_COL, tl.float32, False)
    if phase <= _COLUMNS:
        # the step size is then the clip alone
        _look_and_columns(
            at, phase, ticket, counter_ptr, address_ptr, None, step, gradient, moments, (1.0, 0.0, clip_threshold, 0.0),
            PARAM, GRAD, ALIGNED, STRIDED, SKIP_NONFINITE, False, "constant", False, False, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
    else:
        ok = tl.load(scratch(at, SCALARS) + _OK, cache_modifier=".cg") == 1.0
        if ok:
            if phase == _RESIDUAL:
                pointers = (_address(address_ptr, _G, GRAD, ALIGNED), row_factor_ptr, m_ptr, res_row_ptr)
                _residual_tile(
                    at, ticket, pointers, stream_key(field(at, KEY), step, 1), gradient, moments,
                    one_minus_beta1, one_minus_beta3, eps2,
                    STATE, ALIGNED, STRIDED, STOCHASTIC, SKIP_NONFINITE, BLOCK_ROWS, BLOCK_COLS,
                )  # fmt: skip
            if phase == _RESIDUAL_COLUMNS:
                residual_columns_tile(at, ticket, res_col_ptr, one_minus_beta3, eps2)
            if phase == _APPLY:
                col_ptr = _address(address_ptr, _COL, tl.float32, False)
                p_ptr = _address(address_ptr, _P, PARAM, ALIGNED)
                pointers = (p_ptr, row_factor_ptr, col_ptr, m_ptr, res_row_ptr, res_col_ptr)
                _confident_tile(
                    at, ticket, pointers, stream_key(field(at, KEY), step, 0), rate, rate * weight_decay,
                    PARAM, ALIGNED, STRIDED, STOCHASTIC, BLOCK_ROWS, BLOCK_COLS,
                )  # fmt: skip
        if phase == _APPLY:
            _end_step(at, counter_ptr, address_ptr, step, skipped_ptr)
