"""Moments of projected gradients, what they make of channels, and the limit of the update's growth."""

import triton
import triton.language as tl

from ...field_fragments import column_address, field, field32, rows_in_whole, scratch
from ...fragments import is_finite, lerp, load_gradient, rounded
from ...line_fragments import MATRICES, matrix, offsets
from .constants import (
    CHANNEL_SCALE,
    EXP_AVG_COLUMN,
    EXP_AVG_SQ_COLUMN,
    FACTOR,
    FIRST_ROW,
    MATRIX_SUMS,
    MOMENT_BATCH,
    MOMENT_GROUPS,
    MOMENT_LINES,
    NORM_COLUMN,
    NORM_EPS,
    SQUARES,
    SUM,
    SUMS,
    TINY_NORM,
    WHOLE_ROWS,
)
from .project import extents, moment_offsets, projected_pointer, rank_of

# matrices, and tickets of each, whose sums are added at a time
_MATRICES_AT_A_TIME = tl.constexpr(8)
_GROUPS_AT_A_TIME = tl.constexpr(64)
# channels of a matrix whose sums over processes make scales at a time
_CHANNELS_AT_A_TIME = tl.constexpr(1024)


@triton.jit
def moments_tile(
    at, found, ticket, address_ptr, g_ptr, keys, gradient, weights, eps, projected_scale,
    STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, CONTIGUOUS: tl.constexpr,
    RANKS_INSIDE: tl.constexpr, LINES_BY_8: tl.constexpr, LENGTH_BY_8: tl.constexpr, RANK_BY_8: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr, MODE: tl.constexpr, TENSOR: tl.constexpr,
    RIGHT: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_LINES: tl.constexpr, RANKS_AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """Some channels' moments. Writes these, the channels' scales, and the sums of the ticket.

    ``found`` is as ``at``, for what belongs to channels. PARTIAL: moments of some rows; where those are no channels,
    sums of the channels' squares instead of scales.
    """
    key_m, key_v = keys
    weight_m, weight_v = weights
    extent = extents(at, LINES_BY_8, LENGTH_BY_8)
    count, length = extent
    rank = rank_of(at, RANK_BY_8)
    m_ptr = column_address(address_ptr, EXP_AVG_COLUMN, STATE, ALIGNED)
    v_ptr = column_address(address_ptr, EXP_AVG_SQ_COLUMN, STATE, ALIGNED)
    groups = field32(at, MOMENT_GROUPS)
    group = ticket % groups
    first = (ticket // groups) * field32(at, MOMENT_BATCH)
    end = tl.minimum(first + field32(at, MOMENT_BATCH), field32(at, MATRICES))
    group_lines = field32(at, MOMENT_LINES)
    if LINES_BY_8:
        group_lines = (group_lines // 8) * 8
    first_line = group * group_lines
    end_line = tl.minimum(first_line + group_lines, count)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i
        e_g_ptr = matrix(at, g_ptr, e, count.to(tl.int64) * length, 1, STRIDED)
        normalized_sum = tl.full((), 0.0, tl.float32)
        projected_sum = tl.full((), 0.0, tl.float32)
        moved_sum = tl.full((), 0.0, tl.float32)
        for line in range(first_line, end_line, BLOCK_LINES):
            lines = line + tl.arange(0, BLOCK_LINES)
            inside = lines < end_line
            normalized_squares = tl.zeros((BLOCK_LINES,), tl.float32)
            projected_squares = tl.zeros((BLOCK_LINES,), tl.float32)
            for first_rank in range(0, rank, RANKS_AT_A_TIME):
                ranks = first_rank + tl.arange(0, RANKS_AT_A_TIME)
                mask = inside[:, None] & (ranks < rank)[None, :]
                start, index = moment_offsets(at, e, lines, ranks, count, rank, RANKS_INSIDE)
                if MODE == "none":
                    g_ptrs = e_g_ptr + offsets(at, lines, ranks, extent, 1, STRIDED, CONTIGUOUS)
                    r = load_gradient(g_ptrs, mask, gradient, SKIP_NONFINITE)
                else:
                    r_ptrs = projected_pointer(found) + start + index
                    r = tl.load(r_ptrs, mask=mask, other=0.0, cache_modifier=".cg") * projected_scale
                m = tl.load(m_ptr + start + index, mask=mask, other=0.0).to(tl.float32)
                v = tl.load(v_ptr + start + index, mask=mask, other=0.0).to(tl.float32)
                m = lerp(m, r, weight_m)
                v = lerp(v, r * r, weight_v)
                normalized = tl.where(mask, m / (tl.sqrt(v) + eps), 0.0)
                normalized_squares += tl.sum(normalized * normalized, 1)
                projected_squares += tl.sum(r * r, 1)
                lane = tl.zeros((1, 1), tl.int32)
                noise = start + index
                if PARTIAL:
                    first_row = e.to(tl.int64) * field(at, WHOLE_ROWS)
                    if RIGHT:
                        noise = (first_row + rows_in_whole(at, lines, FIRST_ROW))[:, None] * rank + ranks[None, :]
                    else:
                        noise = (first_row + rows_in_whole(at, ranks, FIRST_ROW))[None, :] * count + lines[:, None]
                tl.store(m_ptr + start + index, rounded(m, key_m, noise, lane, STATE, STOCHASTIC), mask=mask)
                tl.store(v_ptr + start + index, rounded(v, key_v, noise, lane, STATE, STOCHASTIC), mask=mask)
            line_place = e.to(tl.int64) * count + lines
            squares = tl.load(scratch(found, SQUARES) + line_place, mask=inside, other=0.0, cache_modifier=".cg")
            if TENSOR:
                normalized_sum += tl.sum(normalized_squares)
                projected_sum += tl.sum(projected_squares)
                moved_sum += tl.sum(squares)
            elif PARTIAL and not RIGHT:
                normalized_ptr, projected_ptr = channel_sums(at, found, count)
                tl.store(normalized_ptr + line_place, normalized_squares, mask=inside)
                tl.store(projected_ptr + line_place, projected_squares, mask=inside)
            else:
                s = tl.sqrt(normalized_squares) / (tl.sqrt(projected_squares) + NORM_EPS)
                tl.store(scratch(at, CHANNEL_SCALE) + line_place, s, mask=inside)
                moved_sum += tl.sum(s * s * squares)
        sums_ptr = scratch(at, SUM) + (e.to(tl.int64) * groups + group) * SUMS
        tl.store(sums_ptr, normalized_sum)
        tl.store(sums_ptr + 1, projected_sum)
        tl.store(sums_ptr + 2, moved_sum)


@triton.jit
def sums_of(at, matrices, WHICH: tl.constexpr):
    """One of the sums of some matrices over their tickets, in an order that depends on these only."""
    groups = field32(at, MOMENT_GROUPS)
    total = tl.zeros((_MATRICES_AT_A_TIME, _GROUPS_AT_A_TIME), tl.float32)
    for first in range(0, groups, _GROUPS_AT_A_TIME):
        group = first + tl.arange(0, _GROUPS_AT_A_TIME)
        pointers = scratch(at, SUM) + (matrices.to(tl.int64)[:, None] * groups + group[None, :]) * SUMS + WHICH
        mask = (matrices < field32(at, MATRICES))[:, None] & (group < groups)[None, :]
        total += tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 1)


@triton.jit
def channel_sums(at, found, count):
    """Pointers to sums of R~^2 and R^2 of channels whose rows are in several processes; matrices' sums come first."""
    matrices = field(at, MATRICES)
    first = scratch(found, MATRIX_SUMS) + matrices
    return first, first + matrices * count


@triton.jit
def leave_sums(at, sums_ptr, TENSOR: tl.constexpr):
    """What the last ticket of partial moments does: leave the matrices' sums, to be added up over processes."""
    to_ptr = sums_ptr + field(at, MATRIX_SUMS)
    for first in range(0, field32(at, MATRICES), _MATRICES_AT_A_TIME):
        matrices = first + tl.arange(0, _MATRICES_AT_A_TIME)
        mask = matrices < field32(at, MATRICES)
        if TENSOR:
            for which in tl.static_range(SUMS):
                tl.store(to_ptr + matrices.to(tl.int64) * SUMS + which, sums_of(at, matrices, which), mask=mask)
        else:
            tl.store(to_ptr + matrices.to(tl.int64), sums_of(at, matrices, 2), mask=mask)


@triton.jit
def finish_channels(at, found, count):
    """Scales of channels from their sums over processes, and the matrices' sums of what these make of squares."""
    normalized_ptr, projected_ptr = channel_sums(at, found, count)
    for i in range(0, field32(at, MATRICES)):
        e = (tl.full((), 0, tl.int32) + i).to(tl.int64)
        moved = tl.zeros((_CHANNELS_AT_A_TIME,), tl.float32)
        for line in range(0, count, _CHANNELS_AT_A_TIME):
            lines = line + tl.arange(0, _CHANNELS_AT_A_TIME)
            inside = lines < count
            place = e * count + lines
            normalized = tl.load(normalized_ptr + place, mask=inside, other=0.0)
            projected = tl.load(projected_ptr + place, mask=inside, other=0.0)
            s = tl.sqrt(normalized) / (tl.sqrt(projected) + NORM_EPS)
            tl.store(scratch(at, CHANNEL_SCALE) + place, s, mask=inside)
            moved += s * s * tl.load(scratch(found, SQUARES) + place, mask=inside, other=0.0)
        tl.store(scratch(found, MATRIX_SUMS) + e, tl.sum(moved))
    # another thread may read these sums
    tl.debug_barrier()


@triton.jit
def total_of(at, sums_ptr, matrices, WHICH: tl.constexpr, TENSOR: tl.constexpr):
    """One of the sums of some matrices: over their tickets, or over processes where there is sums_ptr."""
    if sums_ptr is None:
        return sums_of(at, matrices, WHICH)
    else:
        place = matrices.to(tl.int64) * SUMS + WHICH if TENSOR else matrices.to(tl.int64)
        mask = matrices < field32(at, MATRICES)
        return tl.load(sums_ptr + field(at, MATRIX_SUMS) + place, mask=mask, other=0.0)


@triton.jit
def finish_moments(
    at, address_ptr, sums_ptr, root_scale, correction, growth_limit, TENSOR: tl.constexpr, LIMIT: tl.constexpr
):
    """What the last ticket of moments does: write the matrices' norms, and what multiplies their gradients.

    ``correction`` is what bias correction makes of the step length.
    """
    norm_ptr = column_address(address_ptr, NORM_COLUMN, tl.float32, False)
    for first in range(0, field32(at, MATRICES), _MATRICES_AT_A_TIME):
        matrices = first + tl.arange(0, _MATRICES_AT_A_TIME)
        mask = matrices < field32(at, MATRICES)
        norm = tl.sqrt(total_of(at, sums_ptr, matrices, 2, TENSOR))
        factor = tl.zeros((_MATRICES_AT_A_TIME,), tl.float32) + root_scale * correction
        if TENSOR:
            normalized = total_of(at, sums_ptr, matrices, 0, TENSOR)
            s = tl.sqrt(normalized) / (tl.sqrt(total_of(at, sums_ptr, matrices, 1, TENSOR)) + NORM_EPS)
            norm *= s
            factor *= s
        if LIMIT:
            last = tl.load(norm_ptr + matrices, mask=mask, other=0.0)
            growth = norm / (last + NORM_EPS)
            known = (last >= TINY_NORM) & is_finite(last)
            excess = tl.where(known & (growth > growth_limit), growth / growth_limit, 1.0)
            norm /= excess
            factor /= excess
        tl.store(norm_ptr + matrices, norm, mask=mask)
        tl.store(scratch(at, FACTOR) + matrices, factor, mask=mask)
