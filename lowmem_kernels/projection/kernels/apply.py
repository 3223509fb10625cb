"""The last read, which writes the parameters."""

import triton
import triton.language as tl

from ...field_fragments import field, field32, rows_in_whole, scratch
from ...fragments import count_skipped, is_finite, load_gradient, rounded
from ...line_fragments import GROUPS, lines_of, matrices_of, matrix, offsets
from .constants import CHANNEL_SCALE, FACTOR, FIRST_ROW, WHOLE_ROWS
from .project import extents


@triton.jit
def apply_tile(
    at, ticket, p_ptr, g_ptr, scale_ptr, key, gradient, lr, decay, skipped_ptr,
    PARAM: tl.constexpr, STRIDED: tl.constexpr, CONTIGUOUS: tl.constexpr, RIGHT: tl.constexpr,
    LINES_BY_8: tl.constexpr, LENGTH_BY_8: tl.constexpr, STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    TENSOR: tl.constexpr, GIVEN: tl.constexpr, PIECES: tl.constexpr, BLOCK_LINES: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
):  # fmt: skip
    """Some channels of p, written. GIVEN: scales are arguments, and elements whose update is not finite are kept."""
    extent = extents(at, LINES_BY_8, LENGTH_BY_8)
    count, length = extent
    size = count.to(tl.int64) * length
    skipped = tl.full((), 0, tl.int32)
    first, end = matrices_of(at, ticket, field32(at, GROUPS))
    _group, first_line, end_line = lines_of(at, ticket, count, LINES_BY_8, False)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i
        e_p_ptr = matrix(at, p_ptr, e, size, 0, STRIDED)
        e_g_ptr = matrix(at, g_ptr, e, size, 1, STRIDED)
        factor = tl.full((), 1.0, tl.float32)
        if not GIVEN:
            factor = tl.load(scratch(at, FACTOR) + e, cache_modifier=".cg")
        for line in range(first_line, end_line, BLOCK_LINES):
            lines = line + tl.arange(0, BLOCK_LINES)
            inside = lines < end_line
            line_place = e.to(tl.int64) * count + lines
            rate = tl.zeros((BLOCK_LINES,), tl.float32) + lr * factor
            if GIVEN:
                rate *= tl.load(scale_ptr + line_place, mask=inside, other=0.0)
            elif not TENSOR:
                rate *= tl.load(scratch(at, CHANNEL_SCALE) + line_place, mask=inside, other=0.0, cache_modifier=".cg")
            for place in range(0, length, BLOCK_PLACES):
                places = place + tl.arange(0, BLOCK_PLACES)
                mask = inside[:, None] & (places < length)[None, :]
                g_ptrs = e_g_ptr + offsets(at, lines, places, extent, 1, STRIDED, CONTIGUOUS)
                p_ptrs = e_p_ptr + offsets(at, lines, places, extent, 0, STRIDED, CONTIGUOUS)
                old = tl.load(p_ptrs, mask=mask, other=0.0)
                p = old.to(tl.float32)
                update = rate[:, None] * load_gradient(g_ptrs, mask, gradient, False)
                # what is left of p decays; in one subtraction, so that nothing moves -0
                new = p - (update + decay * (p - update))
                start = e.to(tl.int64) * size
                if PIECES:
                    start = e.to(tl.int64) * field(at, WHOLE_ROWS)
                    if RIGHT:
                        start = ((start + rows_in_whole(at, lines, FIRST_ROW)) * length)[:, None]
                        lane = places[None, :]
                    else:
                        start = (start + rows_in_whole(at, places, FIRST_ROW))[None, :] * count + lines[:, None]
                        lane = None
                elif RIGHT:
                    start += lines.to(tl.int64)[:, None] * length
                    lane = places[None, :]
                else:
                    start += offsets(at, lines, places, extent, 2, STRIDED, False)
                    lane = tl.zeros((1, 1), tl.int32)
                stored = rounded(new, key, start, lane, PARAM, STOCHASTIC)
                if GIVEN and SKIP_NONFINITE:
                    usable = is_finite(new)
                    stored = tl.where(usable, stored, old)
                    skipped += tl.sum((mask & (usable == 0)).to(tl.int32))
                tl.store(p_ptrs, stored, mask=mask)
    if GIVEN and SKIP_NONFINITE:
        count_skipped(skipped_ptr, skipped)
