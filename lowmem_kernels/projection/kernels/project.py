"""The first read of a gradient: projections and sums of squares of channels."""

import triton
import triton.language as tl

from ...field_fragments import by_fours, field, field32, rows_in_whole, scratch, sum_of
from ...fragments import is_finite
from ...line_fragments import GROUPS, LENGTH, LINES, lines_of, matrices_of, matrix, offsets
from ..draw import OWN as _OWN
from .constants import DRAW_KEY, FIRST_ROW, OK, PROBE, PROBES, PROJECTED, RANK, SQUARES
from .draw import entries, entries_at

OWN = tl.constexpr(_OWN)


@triton.jit
def extents(at, LINES_BY_8: tl.constexpr, LENGTH_BY_8: tl.constexpr):
    """(channels, contracted elements) of a matrix; a multiple of 8 is seen to be one, so that masks cut no vector."""
    lines = field32(at, LINES)
    length = field32(at, LENGTH)
    if LINES_BY_8:
        lines = (lines // 8) * 8
    if LENGTH_BY_8:
        length = (length // 8) * 8
    return lines, length


@triton.jit
def rank_of(at, RANK_BY_8: tl.constexpr):
    """The rank, which is seen to be a multiple of 8 where it is."""
    rank = field32(at, RANK)
    if RANK_BY_8:
        rank = (rank // 8) * 8
    return rank


@triton.jit
def moment_offsets(at, e, lines, ranks, count, rank, RANKS_INSIDE: tl.constexpr):
    """(offset of matrix e, offsets in it) of a tile of a projected gradient or its moments; int64."""
    start = e.to(tl.int64) * count * rank
    if RANKS_INSIDE:
        return start, lines.to(tl.int64)[:, None] * rank + ranks[None, :]
    else:
        return start, ranks.to(tl.int64)[None, :] * count + lines[:, None]


@triton.jit
def projected_pointer(at):
    """Pointer to the projected gradient in the scratch or the sums, whose parts start at multiples of 4 numbers."""
    _, _, scratch_ptr = at
    return scratch_ptr + (field(at, PROJECTED) // 4) * 4


@triton.jit
def load_raw(pointers, mask, gradient, SKIP_NONFINITE: tl.constexpr):
    """A tile of the gradient before what multiplies all of it, in the dtype it is stored in; clipped where it is to be.

    Products and sums of squares are multiplied afterwards: the elements keep their few digits, for products of
    matrices. Those that are clipped are rounded to them.
    """
    g = tl.load(pointers, mask=mask, other=0.0)
    scale, clip_value, _clip_coef = gradient
    if clip_value is not None:
        raw = g.to(tl.float32)
        bound = clip_value / tl.abs(tl.full((), 0.0, tl.float32) + scale)
        x = tl.minimum(raw, bound, propagate_nan=tl.PropagateNan.ALL)
        x = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
        if SKIP_NONFINITE:
            # what clipping would hide
            x = tl.where(is_finite(raw), x, float("nan"))
        g = x.to(g.dtype)
    return g


@triton.jit
def some_sums(x, CONTIGUOUS: tl.constexpr, APART: tl.constexpr):
    """Sums of elements of a channel that one thread has, [channels, places / 4] or [channels, APART].

    A thread has neighbours where channels lie in one piece; else, 8 warps with 4 places each, elements 32 apart.
    """
    if CONTIGUOUS:
        return by_fours(x)
    else:
        return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // APART, APART)), 1)


@triton.jit
def project_tile(
    at, found, ticket, g_ptr, projection_ptr, epoch, gradient,
    STRIDED: tl.constexpr, CONTIGUOUS: tl.constexpr, RANKS_INSIDE: tl.constexpr,
    LINES_BY_8: tl.constexpr, LENGTH_BY_8: tl.constexpr, RANK_BY_8: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    MODE: tl.constexpr, DRAWN: tl.constexpr, PLACES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_LINES: tl.constexpr, BLOCK_PLACES: tl.constexpr, RANKS_AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """Read some channels. Writes their projections, unscaled, their sums of squares, and the sum of these.

    ``found`` is as ``at``, for what belongs to channels. PLACES says where contracted elements are in the whole: "all"
    are here, "fours" that lie side by side there do so here, or "any".

    MODE "dot": by products of matrices, for RANKS_AT_A_TIME ranks, then for the next ones, in another read. "one": by
    sums, with a single row of P that is drawn here where DRAWN. "none": only sums of squares.
    """
    APART: tl.constexpr = 32
    SUMS_OF_LINE: tl.constexpr = BLOCK_PLACES // 4 if CONTIGUOUS else APART
    scale, _clip_value, clip_coef = gradient
    factor = scale * clip_coef
    extent = extents(at, LINES_BY_8, LENGTH_BY_8)
    count, length = extent
    rank = rank_of(at, RANK_BY_8)
    draw_key = field(at, DRAW_KEY)
    size = count.to(tl.int64) * length
    total = tl.full((), 0.0, tl.float32)
    first, end = matrices_of(at, ticket, field32(at, GROUPS))
    _group, first_line, end_line = lines_of(at, ticket, count, LINES_BY_8, False)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i  # a loop counter is a Python number in the interpreter
        e_ptr = matrix(at, g_ptr, e, size, 1, STRIDED)
        for line in range(first_line, end_line, BLOCK_LINES):
            lines = line + tl.arange(0, BLOCK_LINES)
            inside = lines < end_line
            squares = tl.zeros((BLOCK_LINES,), tl.float32)
            if MODE == "dot":
                for first_rank in range(0, rank, RANKS_AT_A_TIME):
                    ranks = first_rank + tl.arange(0, RANKS_AT_A_TIME)
                    product = tl.zeros((BLOCK_LINES, RANKS_AT_A_TIME), tl.float32)
                    by_line = tl.zeros((BLOCK_LINES, SUMS_OF_LINE), tl.float32)
                    for place in range(0, length, BLOCK_PLACES):
                        places = place + tl.arange(0, BLOCK_PLACES)
                        mask = inside[:, None] & (places < length)[None, :]
                        g_ptrs = e_ptr + offsets(at, lines, places, extent, 1, STRIDED, CONTIGUOUS)
                        x = load_raw(g_ptrs, mask, gradient, SKIP_NONFINITE)
                        p_ptrs = projection_ptr + (ranks[None, :] * length + places[:, None])
                        p_mask = (places < length)[:, None] & (ranks < rank)[None, :]
                        p = tl.load(p_ptrs, mask=p_mask, other=0.0)
                        product = tl.dot(x.to(OPERAND), p.to(OPERAND), product, input_precision=PRECISION)
                        wide = x.to(tl.float32)
                        by_line += some_sums(wide * wide, CONTIGUOUS, APART)
                    squares = tl.sum(by_line, 1)
                    start, index = moment_offsets(at, e, lines, ranks, count, rank, RANKS_INSIDE)
                    r_mask = inside[:, None] & (ranks < rank)[None, :]
                    tl.store(projected_pointer(found) + start + index, product * factor, mask=r_mask)
            else:
                by_line = tl.zeros((BLOCK_LINES, SUMS_OF_LINE), tl.float32)
                by_place = tl.zeros((BLOCK_LINES, SUMS_OF_LINE), tl.float32)
                for place in range(0, length, BLOCK_PLACES):
                    places = place + tl.arange(0, BLOCK_PLACES)
                    mask = inside[:, None] & (places < length)[None, :]
                    g_ptrs = e_ptr + offsets(at, lines, places, extent, 1, STRIDED, CONTIGUOUS)
                    x = load_raw(g_ptrs, mask, gradient, SKIP_NONFINITE).to(tl.float32)
                    by_line += some_sums(x * x, CONTIGUOUS, APART)
                    if MODE == "one":
                        if DRAWN:
                            quads = place // 4 + tl.arange(0, BLOCK_PLACES // 4)
                            if PLACES == "any":
                                whole = rows_in_whole(at, places, FIRST_ROW).to(tl.int32)
                                p = entries_at(draw_key, whole, 0, epoch, OWN, False)
                            else:
                                if PLACES == "fours":
                                    quads = (rows_in_whole(at, quads * 4, FIRST_ROW) // 4).to(tl.int32)
                                p = entries(draw_key, quads, 0, epoch, OWN, False)
                        else:
                            p = tl.load(projection_ptr + places, mask=places < length, other=0.0).to(tl.float32)
                        by_place += some_sums(x * p[None, :], CONTIGUOUS, APART)
                squares = tl.sum(by_line, 1)
                if MODE == "one":
                    r_ptrs = projected_pointer(found) + e.to(tl.int64) * count + lines
                    tl.store(r_ptrs, tl.sum(by_place, 1) * factor, mask=inside)
            squares = squares * factor * factor
            tl.store(scratch(found, SQUARES) + e.to(tl.int64) * count + lines, squares, mask=inside)
            total += tl.sum(tl.where(inside, squares, 0.0))
    tl.store(scratch(at, PROBE) + ticket, total)


@triton.jit
def finish_projection(at, sums_ptr, SKIP_NONFINITE: tl.constexpr):
    """What the last ticket of the first read does: say whether the parameter is to be updated, or leave its sum."""
    if sums_ptr is not None:
        tl.store(sums_ptr + field(at, OK), sum_of(scratch(at, PROBE), field32(at, PROBES)))
    elif SKIP_NONFINITE:
        total = sum_of(scratch(at, PROBE), field32(at, PROBES))
        tl.store(scratch(at, OK), tl.where(is_finite(total), 1.0, 0.0))
    else:
        tl.store(scratch(at, OK), 1.0)


@triton.jit
def is_usable(at, sums_ptr, SKIP_NONFINITE: tl.constexpr):
    """1 where a parameter in pieces is to be updated, as its sum of squares over processes says."""
    ok = tl.full((), 1.0, tl.float32)
    if SKIP_NONFINITE:
        ok = tl.where(is_finite(tl.load(sums_ptr + field(at, OK))), 1.0, 0.0)
    return ok
