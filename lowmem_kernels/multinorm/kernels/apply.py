"""The last read, which writes the parameters, or only the scales."""

import triton
import triton.language as tl

from ...field_fragments import by_fours, field, field32, rows_in_whole, scratch
from ...fragments import count_skipped, is_finite, lerp, rounded
from ...line_fragments import GROUPS, extents, lines_of, matrices_of, matrix, offsets
from .constants import FACTOR, FIRST_LINE, LINE_SCALE, WHOLE_LINES
from .tile import cross_scales, line_scales, load_x


@triton.jit
def vector(pointer, e, count, index, mask):
    """Values of a vector that belongs to the lines or the places of matrix e."""
    return tl.load(pointer + e.to(tl.int64) * count + index, mask=mask, other=0.0)


@triton.jit
def write_tile(
    at, e, lines, places, mask, extent, index, x, moved, s, t, offset, p_ptrs, m_ptrs, keys, rates,
    momentum, one_minus_momentum, PIECES: tl.constexpr,
    PARAM: tl.constexpr, STATE: tl.constexpr, ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Write a tile of p and m; return how many elements were kept because their update is not finite, where KEEP."""
    key_p, key_m = keys
    rate, decay = rates
    count, length = extent
    update = x * s[:, None] * t[None, :]
    old_p = tl.load(p_ptrs, mask=mask, other=0.0)
    if MOMENTUM == "after" or (MOMENTUM == "before" and KEEP):
        old_m = tl.load(m_ptrs, mask=mask, other=0.0)
    if MOMENTUM == "after":
        moved = lerp(old_m.to(tl.float32), update, one_minus_momentum)
        update = lerp(update, moved, momentum) if NESTEROV else moved
    p = old_p.to(tl.float32)
    new = p - (rate * (update + offset) + decay * p)
    start = e.to(tl.int64) * (count.to(tl.int64) * length)
    if PIECES:
        # their lines are rows
        whole = e.to(tl.int64) * field(at, WHOLE_LINES) + rows_in_whole(at, lines, FIRST_LINE)
        start = whole[:, None] * length
        lane = places[None, :]
    elif ROWS:
        start += lines.to(tl.int64)[:, None] * length
        lane = places[None, :]
    else:
        start += index
        lane = tl.zeros((1, 1), tl.int32)
    new_p = rounded(new, key_p, start, lane, PARAM, STOCHASTIC)
    skipped = tl.full((), 0, tl.int32)
    if KEEP:
        usable = is_finite(new)
        new_p = tl.where(usable, new_p, old_p)
        skipped += tl.sum((mask & (usable == 0)).to(tl.int32))
    tl.store(p_ptrs, new_p, mask=mask)
    if MOMENTUM != "none":
        new_m = rounded(moved, key_m, start, lane, STATE, STOCHASTIC)
        if KEEP:
            new_m = tl.where(usable, new_m, old_m)
        tl.store(m_ptrs, new_m, mask=mask)
    return skipped


@triton.jit
def apply_tile(
    at, ticket, sweeps, pointers, keys, gradient, rates, momentum, one_minus_momentum, eps, skipped_ptr,
    PIECES: tl.constexpr, PARAM: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    CONTIGUOUS: tl.constexpr, ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    SIGN: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, CLAMP: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr, TOTAL: tl.constexpr, FIRST_LINE: tl.constexpr, FIRST_CROSS: tl.constexpr,
    LAST_LINE: tl.constexpr, GIVEN: tl.constexpr, OFFSETS: tl.constexpr, KEEP: tl.constexpr, WRITE: tl.constexpr,
    RESIDENT: tl.constexpr, BLOCK_LINES: tl.constexpr, BLOCK_PLACES: tl.constexpr,
):  # fmt: skip
    """The last read of a group of lines. Writes p and m; without WRITE the scales of the lines.

    LAST_LINE: lines are divided by their norm here, and the tile has whole lines where RESIDENT. GIVEN: scales are
    arguments. KEEP: elements whose update is not finite are kept.
    """
    p_ptr, g_ptr, m_ptr, line_scale_ptr, cross_scale_ptr, line_offset_ptr, cross_offset_ptr = pointers
    extent = extents(at, ALIGNED, CONTIGUOUS)
    count, length = extent
    size = count.to(tl.int64) * length
    have_lines = sweeps > FIRST_LINE
    have_places = sweeps - TOTAL > FIRST_CROSS
    skipped = tl.full((), 0, tl.int32)
    first, end = matrices_of(at, ticket, field32(at, GROUPS))
    _group, first_line, end_line = lines_of(at, ticket, count, ALIGNED, CONTIGUOUS)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i
        e_p_ptr = matrix(at, p_ptr, e, size, 0, STRIDED)
        e_g_ptr = matrix(at, g_ptr, e, size, 1, STRIDED)
        e_m_ptr = matrix(at, m_ptr, e, size, 2, STRIDED)
        for line in range(first_line, end_line, BLOCK_LINES):
            lines = line + tl.arange(0, BLOCK_LINES)
            inside = lines < end_line
            squares = tl.zeros((BLOCK_LINES,), tl.float32)
            if LAST_LINE and not RESIDENT:
                by_line = tl.zeros((BLOCK_LINES, BLOCK_PLACES // 4), tl.float32)
                for place in range(0, length, BLOCK_PLACES):
                    places = place + tl.arange(0, BLOCK_PLACES)
                    mask = inside[:, None] & (places < length)[None, :]
                    g_ptrs = e_g_ptr + offsets(at, lines, places, extent, 1, STRIDED, CONTIGUOUS)
                    m_ptrs = e_m_ptr + offsets(at, lines, places, extent, 2, STRIDED, ROWS)
                    x, _moved = load_x(
                        g_ptrs, m_ptrs, mask, gradient, momentum, SKIP_NONFINITE, SIGN, MOMENTUM, NESTEROV
                    )
                    y = x * cross_scales(at, e, places, places < length, have_places)[None, :]
                    by_line += by_fours(y * y)
                squares = tl.sum(by_line, 1)
            if GIVEN:
                s = vector(line_scale_ptr, e, count, lines, inside)
            else:
                s = line_scales(at, e, lines, inside, squares, LAST_LINE, have_lines, eps, CLAMP, HAS_THRESHOLD)
            if TOTAL:
                s *= tl.load(scratch(at, FACTOR) + e, cache_modifier=".cg")
            if not WRITE and not (LAST_LINE and RESIDENT):
                tl.store(scratch(at, LINE_SCALE) + e.to(tl.int64) * count + lines, s, mask=inside)
            if WRITE or (LAST_LINE and RESIDENT):
                for place in range(0, length, BLOCK_PLACES):
                    places = place + tl.arange(0, BLOCK_PLACES)
                    mask = inside[:, None] & (places < length)[None, :]
                    index = offsets(at, lines, places, extent, 2, STRIDED, ROWS)
                    g_ptrs = e_g_ptr + offsets(at, lines, places, extent, 1, STRIDED, CONTIGUOUS)
                    m_ptrs = e_m_ptr + index
                    x, moved = load_x(
                        g_ptrs, m_ptrs, mask, gradient, momentum, SKIP_NONFINITE, SIGN, MOMENTUM, NESTEROV
                    )
                    if GIVEN:
                        t = vector(cross_scale_ptr, e, length, places, places < length)
                    else:
                        t = cross_scales(at, e, places, places < length, have_places)
                    if LAST_LINE and RESIDENT:
                        # the one tile of these lines
                        y = x * t[None, :]
                        squares = tl.sum(y * y, 1)
                        s = line_scales(at, e, lines, inside, squares, True, have_lines, eps, CLAMP, HAS_THRESHOLD)
                        if not WRITE:
                            tl.store(scratch(at, LINE_SCALE) + e.to(tl.int64) * count + lines, s, mask=inside)
                    if WRITE:
                        offset = 0.0
                        if OFFSETS:
                            a = vector(line_offset_ptr, e, count, lines, inside)
                            offset = a[:, None] + vector(cross_offset_ptr, e, length, places, places < length)[None, :]
                        p_ptrs = e_p_ptr + offsets(at, lines, places, extent, 0, STRIDED, CONTIGUOUS)
                        skipped += write_tile(
                            at, e, lines, places, mask, extent, index, x, moved, s, t, offset, p_ptrs, m_ptrs, keys,
                            rates, momentum, one_minus_momentum, PIECES,
                            PARAM, STATE, ROWS, STOCHASTIC, MOMENTUM, NESTEROV, KEEP and SKIP_NONFINITE,
                        )  # fmt: skip
    if WRITE and KEEP and SKIP_NONFINITE:
        count_skipped(skipped_ptr, skipped)
