"""A matrix that one program holds: read once, normalized in registers, written."""

import triton
import triton.language as tl

from ...field_fragments import scratch
from ...fragments import is_finite
from ...line_fragments import extents, matrix, offsets
from .apply import write_tile
from .constants import OK
from .tile import load_x, scale_of


@triton.jit
def whole_tile(
    at, pairs, pointers, keys, gradient, rates, momentum, one_minus_momentum, eps, row_threshold,
    PARAM: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    CONTIGUOUS: tl.constexpr, ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    SIGN: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, CLAMP: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr, TOTAL: tl.constexpr, TOTAL_LINE: tl.constexpr, FIRST_PLAIN: tl.constexpr,
    LAST_LINE: tl.constexpr, BLOCK_LINES: tl.constexpr, BLOCK_PLACES: tl.constexpr,
):  # fmt: skip
    """All norms of a parameter that is a single matrix and fits into a tile. Writes p, m, and whether all is finite."""
    p_ptr, g_ptr, m_ptr = pointers
    extent = extents(at, ALIGNED, CONTIGUOUS)
    count, length = extent
    lines = tl.arange(0, BLOCK_LINES)
    places = tl.arange(0, BLOCK_PLACES)
    mask = (lines < count)[:, None] & (places < length)[None, :]
    e = tl.full((), 0, tl.int32)
    index = offsets(at, lines, places, extent, 2, STRIDED, ROWS)
    g_ptrs = matrix(at, g_ptr, e, 0, 1, STRIDED) + offsets(at, lines, places, extent, 1, STRIDED, CONTIGUOUS)
    m_ptrs = m_ptr + index
    x, moved = load_x(g_ptrs, m_ptrs, mask, gradient, momentum, SKIP_NONFINITE, SIGN, MOMENTUM, NESTEROV)
    s = tl.full((BLOCK_LINES,), 1.0, tl.float32)
    t = tl.full((BLOCK_PLACES,), 1.0, tl.float32)
    probe = 0.0
    if HAS_THRESHOLD:
        norms = tl.sqrt(tl.sum(x * x, 1))
        total_norm = tl.sum(norms)
        x = tl.where((norms >= row_threshold * total_norm / count)[:, None], x, 0.0)
        probe += 0.0 * total_norm
    if FIRST_PLAIN:
        t = scale_of(tl.sum(x * x, 0), count.to(tl.float32), t, eps, CLAMP)
    for _pair in range(pairs):
        y = x * t[None, :]
        s = scale_of(tl.sum(y * y, 1), length.to(tl.float32), s, eps, CLAMP)
        z = x * s[:, None]
        t = scale_of(tl.sum(z * z, 0), count.to(tl.float32), t, eps, CLAMP)
    if TOTAL or LAST_LINE:
        y = x * t[None, :]
        squares = tl.sum(y * y, 1)
        if TOTAL_LINE or LAST_LINE:
            s = scale_of(squares, length.to(tl.float32), s, eps, CLAMP)
        if TOTAL:
            total = tl.sum(s * s * squares)
            s *= scale_of(total, count.to(tl.float32) * length.to(tl.float32), 1.0, eps, False)
    ok = 1.0
    if SKIP_NONFINITE:
        probe += tl.sum(tl.where(lines < count, 0.0 * s, 0.0)) + tl.sum(tl.where(places < length, 0.0 * t, 0.0))
        ok = tl.where(is_finite(probe), 1.0, 0.0)
    tl.store(scratch(at, OK), ok)
    if ok == 1.0:
        p_ptrs = matrix(at, p_ptr, e, 0, 0, STRIDED) + offsets(at, lines, places, extent, 0, STRIDED, CONTIGUOUS)
        write_tile(
            at, e, lines, places, mask, extent, index, x, moved, s, t, 0.0, p_ptrs, m_ptrs, keys, rates,
            momentum, one_minus_momentum, False, PARAM, STATE, ROWS, STOCHASTIC, MOMENTUM, NESTEROV, False,
        )  # fmt: skip
