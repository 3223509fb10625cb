"""Moments of projected gradients, what they make of channels, and the limit of the update's growth."""

import triton
import triton.language as tl

from ...field_fragments import column_address, field32, scratch
from ...fragments import is_finite, lerp, load_gradient, rounded
from ...line_fragments import MATRICES, matrix, offsets
from .constants import (
    CHANNEL_SCALE,
    EXP_AVG_COLUMN,
    EXP_AVG_SQ_COLUMN,
    FACTOR,
    MOMENT_BATCH,
    MOMENT_GROUPS,
    MOMENT_LINES,
    NORM_COLUMN,
    NORM_EPS,
    SQUARES,
    SUM,
    SUMS,
    TINY_NORM,
)
from .project import extents, moment_offsets, projected_pointer, rank_of

# matrices, and tickets of each, whose sums are added at a time
_MATRICES_AT_A_TIME = tl.constexpr(8)
_GROUPS_AT_A_TIME = tl.constexpr(64)


@triton.jit
def moments_tile(
    at, ticket, address_ptr, g_ptr, keys, gradient, weights, eps, projected_scale,
    STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, CONTIGUOUS: tl.constexpr,
    RANKS_INSIDE: tl.constexpr, LINES_BY_8: tl.constexpr, LENGTH_BY_8: tl.constexpr, RANK_BY_8: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr, MODE: tl.constexpr, TENSOR: tl.constexpr,
    BLOCK_LINES: tl.constexpr, RANKS_AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """Some channels' moments. Writes these, the channels' scales, and the sums of the ticket."""
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
                    r_ptrs = projected_pointer(at) + start + index
                    r = tl.load(r_ptrs, mask=mask, other=0.0, cache_modifier=".cg") * projected_scale
                m = tl.load(m_ptr + start + index, mask=mask, other=0.0).to(tl.float32)
                v = tl.load(v_ptr + start + index, mask=mask, other=0.0).to(tl.float32)
                m = lerp(m, r, weight_m)
                v = lerp(v, r * r, weight_v)
                normalized = tl.where(mask, m / (tl.sqrt(v) + eps), 0.0)
                normalized_squares += tl.sum(normalized * normalized, 1)
                projected_squares += tl.sum(r * r, 1)
                lane = tl.zeros((1, 1), tl.int32)
                tl.store(m_ptr + start + index, rounded(m, key_m, start + index, lane, STATE, STOCHASTIC), mask=mask)
                tl.store(v_ptr + start + index, rounded(v, key_v, start + index, lane, STATE, STOCHASTIC), mask=mask)
            line_place = e.to(tl.int64) * count + lines
            squares = tl.load(scratch(at, SQUARES) + line_place, mask=inside, other=0.0, cache_modifier=".cg")
            if TENSOR:
                normalized_sum += tl.sum(normalized_squares)
                projected_sum += tl.sum(projected_squares)
                moved_sum += tl.sum(squares)
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
def finish_moments(at, address_ptr, root_scale, correction, growth_limit, TENSOR: tl.constexpr, LIMIT: tl.constexpr):
    """What the last ticket of moments does: write the matrices' norms, and what multiplies their gradients.

    ``correction`` is what bias correction makes of the step length.
    """
    norm_ptr = column_address(address_ptr, NORM_COLUMN, tl.float32, False)
    for first in range(0, field32(at, MATRICES), _MATRICES_AT_A_TIME):
        matrices = first + tl.arange(0, _MATRICES_AT_A_TIME)
        mask = matrices < field32(at, MATRICES)
        norm = tl.sqrt(sums_of(at, matrices, 2))
        factor = tl.zeros((_MATRICES_AT_A_TIME,), tl.float32) + root_scale * correction
        if TENSOR:
            s = tl.sqrt(sums_of(at, matrices, 0)) / (tl.sqrt(sums_of(at, matrices, 1)) + NORM_EPS)
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
