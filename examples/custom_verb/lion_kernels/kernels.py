"""The Triton kernel of Lion. What it calls are fragments, in forms that the compiler does well with."""

import triton
import triton.language as tl

from lowmem_kernels.fragments import (
    address,
    count_skipped,
    elements,
    find_row,
    is_last_program,
    place_in_whole,
    programs_of,
    rounded,
    scalar_or,
    stream_key,
    tile_bounds,
    transformed,
)

# address columns of the table: parameter, gradient, state, step
_COLUMNS = tl.constexpr(4)
# lanes of the block that ends an aligned tensor whose size is no multiple of the vector of eight 16-bit values
_TAIL = tl.constexpr(8)


@triton.jit
def _lion_block(
    table_ptr, row_ptr, pointers, keys, start, lane, limit, gradient, hyper,
    PARAM: tl.constexpr, STATE: tl.constexpr, STRIDED: tl.constexpr, DIGITS: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
):  # fmt: skip
    """Update elements start + lane < limit; return 1 where the gradient was not finite and nothing changed."""
    p_ptr, g_ptr, m_ptr = pointers
    p_ptrs = elements(p_ptr, table_ptr, row_ptr, start, lane, 0, STRIDED)
    g_ptrs = elements(g_ptr, table_ptr, row_ptr, start, lane, 1, STRIDED)
    m_ptrs = elements(m_ptr, table_ptr, row_ptr, start, lane, 2, False)
    mask = start + lane < limit
    grad = tl.load(g_ptrs, mask=mask, other=0.0)
    p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)

    # the rule
    g, usable = transformed(grad, gradient, SKIP_NONFINITE)
    lr, weight_decay, beta1, one_minus_beta1, one_minus_beta2 = hyper
    mixed = beta1 * m + one_minus_beta1 * g
    sign = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, mixed))  # of NaN NaN
    new_p = p - lr * (weight_decay * p + sign)
    new_m = m + one_minus_beta2 * (g - m)

    # noise belongs to an element of the whole parameter, wherever shards of it are
    start = place_in_whole(table_ptr, row_ptr, start, lane, DIGITS)
    if DIGITS == 2:
        lane = None
    # the mask must stay free of data, or stores fall apart into single elements: what is skipped is written back
    key_p, key_m = keys
    tl.store(m_ptrs, rounded(tl.where(usable, new_m, m), key_m, start, lane, STATE, STOCHASTIC), mask=mask)
    tl.store(p_ptrs, rounded(tl.where(usable, new_p, p), key_p, start, lane, PARAM, STOCHASTIC), mask=mask)
    return (mask & (usable == 0)).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def _lion_kernel(
    table_ptr, counter_ptr, skipped_ptr, found_inf, rows,
    lr, weight_decay, beta1, one_minus_beta1, one_minus_beta2, scale, inv_scale, clip_value, clip_coef,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    DIGITS: tl.constexpr, STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lion. One program owns TILE consecutive elements of one tensor and writes p and m there.

    The last program of a tensor advances its step, which all the others have read by then.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    row_ptr, row = find_row(table_ptr, rows, tl.program_id(0), _COLUMNS)
    pointers = (
        address(row_ptr, 0, PARAM, ALIGNED),
        address(row_ptr, 1, GRAD, ALIGNED),
        address(row_ptr, 2, STATE, ALIGNED),
    )
    step_ptr = address(row_ptr, 3, tl.float32, False)
    start, end, vector_end, numel = tile_bounds(row_ptr, tl.program_id(0), TILE, ALIGNED)

    step = tl.load(step_ptr) + 1.0
    key = tl.load(row_ptr + 2)
    # one stream of noise for each tensor that is written, in the reference's order
    keys = (stream_key(key, step, 0), stream_key(key, step, 1))
    hyper = (scalar_or(lr, 0.0), weight_decay, beta1, one_minus_beta1, one_minus_beta2)
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))

    skipped = tl.zeros((BLOCK,), tl.int32)
    for block in range(start, end, BLOCK):
        skipped += _lion_block(
            table_ptr, row_ptr, pointers, keys, block, tl.arange(0, BLOCK), vector_end, gradient, hyper,
            PARAM, STATE, STRIDED, DIGITS, STOCHASTIC, SKIP_NONFINITE,
        )  # fmt: skip
    total = tl.sum(skipped)
    if ALIGNED:
        if end == numel and vector_end < numel:
            skipped_tail = _lion_block(
                table_ptr, row_ptr, pointers, keys, vector_end, tl.arange(0, _TAIL), numel, gradient, hyper,
                PARAM, STATE, STRIDED, DIGITS, STOCHASTIC, SKIP_NONFINITE,
            )  # fmt: skip
            total += tl.sum(skipped_tail)
    count_skipped(skipped_ptr, total)
    if is_last_program(counter_ptr + row, programs_of(numel, TILE)):
        tl.store(step_ptr, step)
