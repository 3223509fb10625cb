"""Triton kernels of the elementwise family. README.md beside this file has the picture and the bytes."""

import triton
import triton.language as tl

from ..fragments import (
    address,
    count_skipped,
    elements,
    find_row,
    is_finite,
    is_last_program,
    lerp,
    one_minus_power,
    place_in_whole,
    programs_of,
    rounded,
    scalar_or,
    stream_key,
    tile_bounds,
    transformed,
)

# lanes of the block that ends an aligned tensor whose size is no multiple of the vector of eight 16-bit values
_TAIL = tl.constexpr(8)
# address columns of the tables: parameter, gradient, states, step
_ADAMW_COLUMNS = tl.constexpr(5)
_SCALED_UPDATE_COLUMNS = tl.constexpr(3)
_GRAD_STATS_COLUMNS = tl.constexpr(2)


@triton.jit
def _adamw_block(
    table_ptr, row_ptr, pointers, keys, start, lane, limit, gradient, hyper,
    PARAM: tl.constexpr, STATE: tl.constexpr, STRIDED: tl.constexpr, DIGITS: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
):  # fmt: skip
    """Update elements start + lane < limit; return 1 where the gradient was not finite and nothing changed."""
    p_ptr, g_ptr, m_ptr, v_ptr = pointers
    p_ptrs = elements(p_ptr, table_ptr, row_ptr, start, lane, 0, STRIDED)
    g_ptrs = elements(g_ptr, table_ptr, row_ptr, start, lane, 1, STRIDED)
    m_ptrs = elements(m_ptr, table_ptr, row_ptr, start, lane, 2, False)
    v_ptrs = elements(v_ptr, table_ptr, row_ptr, start, lane, 3, False)
    mask = start + lane < limit

    grad = tl.load(g_ptrs, mask=mask, other=0.0)
    p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)

    g, usable = transformed(grad, gradient, SKIP_NONFINITE)
    step_size, decay, rsqrt_correction2, one_minus_beta1, one_minus_beta2, eps = hyper
    new_m = lerp(m, g, one_minus_beta1)
    new_v = lerp(v, g * g, one_minus_beta2)
    new_p = p - (step_size * (new_m / (tl.sqrt(new_v) * rsqrt_correction2 + eps)) + decay * p)

    start = place_in_whole(table_ptr, row_ptr, start, lane, DIGITS)
    if DIGITS == 2:
        lane = None
    # the mask must stay free of data, or stores fall apart into single elements: what is skipped is written back
    key_p, key_m, key_v = keys
    tl.store(m_ptrs, rounded(tl.where(usable, new_m, m), key_m, start, lane, STATE, STOCHASTIC), mask=mask)
    tl.store(v_ptrs, rounded(tl.where(usable, new_v, v), key_v, start, lane, STATE, STOCHASTIC), mask=mask)
    tl.store(p_ptrs, rounded(tl.where(usable, new_p, p), key_p, start, lane, PARAM, STOCHASTIC), mask=mask)
    return (mask & (usable == 0)).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def _adamw_kernel(
    table_ptr, counter_ptr, skipped_ptr, found_inf, rows,
    lr, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps, weight_decay,
    scale, inv_scale, clip_value, clip_coef,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    DIGITS: tl.constexpr, STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW. One program owns TILE consecutive elements of one tensor and writes p, m and v there.

    The last program of a tensor advances its step, which all the others have read by then.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    row_ptr, row = find_row(table_ptr, rows, tl.program_id(0), _ADAMW_COLUMNS)
    p_ptr = address(row_ptr, 0, PARAM, ALIGNED)
    g_ptr = address(row_ptr, 1, GRAD, ALIGNED)
    m_ptr = address(row_ptr, 2, STATE, ALIGNED)
    v_ptr = address(row_ptr, 3, STATE, ALIGNED)
    step_ptr = address(row_ptr, 4, tl.float32, False)
    start, end, vector_end, numel = tile_bounds(row_ptr, tl.program_id(0), TILE, ALIGNED)

    step = tl.load(step_ptr) + 1.0
    rate = scalar_or(lr, 0.0)
    hyper = (
        rate / one_minus_power(log_beta1, step),
        rate * weight_decay,
        tl.rsqrt(one_minus_power(log_beta2, step)),
        one_minus_beta1,
        one_minus_beta2,
        eps,
    )
    key = tl.load(row_ptr + 2)
    keys = (stream_key(key, step, 0), stream_key(key, step, 1), stream_key(key, step, 2))
    pointers = (p_ptr, g_ptr, m_ptr, v_ptr)
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))

    skipped = tl.zeros((BLOCK,), tl.int32)
    for block in range(start, end, BLOCK):
        skipped += _adamw_block(
            table_ptr, row_ptr, pointers, keys, block, tl.arange(0, BLOCK), vector_end, gradient, hyper,
            PARAM, STATE, STRIDED, DIGITS, STOCHASTIC, SKIP_NONFINITE,
        )  # fmt: skip
    total = tl.sum(skipped)
    if ALIGNED:
        if end == numel and vector_end < numel:
            skipped_tail = _adamw_block(
                table_ptr, row_ptr, pointers, keys, vector_end, tl.arange(0, _TAIL), numel, gradient, hyper,
                PARAM, STATE, STRIDED, DIGITS, STOCHASTIC, SKIP_NONFINITE,
            )  # fmt: skip
            total += tl.sum(skipped_tail)
    count_skipped(skipped_ptr, total)
    if is_last_program(counter_ptr + row, programs_of(numel, TILE)):
        tl.store(step_ptr, step)


@triton.jit
def _scaled_update_block(
    table_ptr, row_ptr, p_ptr, g_ptr, key, start, lane, limit, gradient, lr, decay,
    PARAM: tl.constexpr, STRIDED: tl.constexpr, DIGITS: tl.constexpr, STOCHASTIC: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
):  # fmt: skip
    """Update elements start + lane < limit; return 1 where the gradient was not finite and nothing changed."""
    p_ptrs = elements(p_ptr, table_ptr, row_ptr, start, lane, 0, STRIDED)
    g_ptrs = elements(g_ptr, table_ptr, row_ptr, start, lane, 1, STRIDED)
    mask = start + lane < limit
    grad = tl.load(g_ptrs, mask=mask, other=0.0)
    p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
    g, usable = transformed(grad, gradient, SKIP_NONFINITE)
    new_p = tl.where(usable, p - (lr * g + decay * p), p)
    start = place_in_whole(table_ptr, row_ptr, start, lane, DIGITS)
    if DIGITS == 2:
        lane = None
    tl.store(p_ptrs, rounded(new_p, key, start, lane, PARAM, STOCHASTIC), mask=mask)
    return (mask & (usable == 0)).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def _scaled_update_kernel(
    table_ptr, counter_ptr, skipped_ptr, found_inf, rows,
    lr, weight_decay, scale, inv_scale, clip_value, clip_coef,
    PARAM: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    DIGITS: tl.constexpr, STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LOMO's update. One program owns TILE consecutive elements of one tensor and writes p there.

    The last program of a tensor advances its step, which all the others have read by then.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    row_ptr, row = find_row(table_ptr, rows, tl.program_id(0), _SCALED_UPDATE_COLUMNS)
    p_ptr = address(row_ptr, 0, PARAM, ALIGNED)
    g_ptr = address(row_ptr, 1, GRAD, ALIGNED)
    step_ptr = address(row_ptr, 2, tl.float32, False)
    start, end, vector_end, numel = tile_bounds(row_ptr, tl.program_id(0), TILE, ALIGNED)

    step = tl.load(step_ptr) + 1.0
    key = stream_key(tl.load(row_ptr + 2), step, 0)
    rate = scalar_or(lr, 0.0)
    decay = rate * weight_decay
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))

    skipped = tl.zeros((BLOCK,), tl.int32)
    for block in range(start, end, BLOCK):
        skipped += _scaled_update_block(
            table_ptr, row_ptr, p_ptr, g_ptr, key, block, tl.arange(0, BLOCK), vector_end, gradient, rate, decay,
            PARAM, STRIDED, DIGITS, STOCHASTIC, SKIP_NONFINITE,
        )  # fmt: skip
    total = tl.sum(skipped)
    if ALIGNED:
        if end == numel and vector_end < numel:
            skipped_tail = _scaled_update_block(
                table_ptr, row_ptr, p_ptr, g_ptr, key, vector_end, tl.arange(0, _TAIL), numel, gradient, rate, decay,
                PARAM, STRIDED, DIGITS, STOCHASTIC, SKIP_NONFINITE,
            )  # fmt: skip
            total += tl.sum(skipped_tail)
    count_skipped(skipped_ptr, total)
    if is_last_program(counter_ptr + row, programs_of(numel, TILE)):
        tl.store(step_ptr, step)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _grad_stats_kernel(
    table_ptr, counter_ptr, partial_ptr, out_ptr, rows, tiles,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sum of squares and number of non-finite elements of all gradients.

    Program k owns tiles k, k + PROGRAMS, ... and writes partial[k]; the last one to finish writes out = [sum, number]
    from the partials, in their order. PROGRAMS is a constant of the project, so the bits do not depend on the device.
    """
    program = tl.program_id(0)
    squares = tl.zeros((BLOCK,), tl.float32)
    nonfinite = tl.zeros((BLOCK,), tl.int32)
    lane = tl.arange(0, BLOCK)
    for tile in range(program, tiles, PROGRAMS):
        row_ptr, _ = find_row(table_ptr, rows, tile, _GRAD_STATS_COLUMNS)
        g_ptr = address(row_ptr, 1, GRAD, ALIGNED)
        start, end, vector_end, numel = tile_bounds(row_ptr, tile, TILE, ALIGNED)
        for block in range(start, end, BLOCK):
            g_ptrs = elements(g_ptr, table_ptr, row_ptr, block, lane, 1, STRIDED)
            g = tl.load(g_ptrs, mask=block + lane < vector_end, other=0.0).to(tl.float32)
            squares += g * g
            nonfinite += (is_finite(g) == 0).to(tl.int32)
        if ALIGNED:
            if end == numel and vector_end < numel:
                # fewer than eight elements are left: the first lanes take them
                g = tl.load(g_ptr + vector_end + lane, mask=vector_end + lane < numel, other=0.0).to(tl.float32)
                squares += g * g
                nonfinite += (is_finite(g) == 0).to(tl.int32)
    tl.store(partial_ptr + program, tl.sum(squares))
    tl.store(partial_ptr + PROGRAMS + program, tl.sum(nonfinite).to(tl.float32))
    programs = tl.num_programs(0)
    if is_last_program(counter_ptr, programs):
        k = tl.arange(0, PROGRAMS)
        written = k < programs
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + k, mask=written, other=0.0, cache_modifier=".cg")))
        number = tl.load(partial_ptr + PROGRAMS + k, mask=written, other=0.0, cache_modifier=".cg")
        tl.store(out_ptr + 1, tl.sum(number))
