"""Finding the way from a ticket to its lines and tiles, reading x, and the scale that a norm makes."""

import triton
import triton.language as tl

from ...field_fragments import field, field32, scratch, walk_dims
from ...fragments import load_gradient
from .constants import (
    BATCH,
    CROSS_SCALE,
    GROUP_LINES,
    GROUPS,
    LENGTH,
    LINE_DIMS,
    LINE_NDIM,
    LINE_NORM,
    LINE_SCALE,
    LINES,
    MATRICES,
    MATRIX_DIMS,
    MATRIX_NDIM,
    PLACE_DIMS,
    PLACE_NDIM,
    THRESHOLD,
    TINY,
)


@triton.jit
def extents(at, ALIGNED: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """(lines, length) of a matrix.

    Where ALIGNED, what lies side by side in memory is a multiple of 8, as a product, so that the compiler can prove
    that a mask never cuts a vector.
    """
    lines = field32(at, LINES)
    length = field32(at, LENGTH)
    if ALIGNED:
        if CONTIGUOUS:
            length = (length // 8) * 8
        else:
            lines = (lines // 8) * 8
    return lines, length


@triton.jit
def matrices_of(at, ticket, tickets):
    """(first, end) of the matrices of a ticket, of which ``tickets`` share a matrix."""
    first = (ticket // tickets) * field32(at, BATCH)
    return first, tl.minimum(first + field32(at, BATCH), field32(at, MATRICES))


@triton.jit
def lines_of(at, ticket, lines, ALIGNED: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """(group, first line, end line) of a ticket; the last two are seen to be multiples of 8 as in `extents`."""
    group = ticket % field32(at, GROUPS)
    group_lines = field32(at, GROUP_LINES)
    if ALIGNED and not CONTIGUOUS:
        group_lines = (group_lines // 8) * 8
    first = group * group_lines
    return group, first, tl.minimum(first + group_lines, lines)


@triton.jit
def matrix(at, pointer, e, size, OPERAND: tl.constexpr, STRIDED: tl.constexpr):
    """Pointer to matrix e of p (OPERAND 0), g (1), or something contiguous (2)."""
    if STRIDED and OPERAND != 2:
        return pointer + walk_dims(at, field(at, MATRIX_DIMS), field32(at, MATRIX_NDIM), e, OPERAND, 2)
    else:
        return pointer + e.to(tl.int64) * size


@triton.jit
def offsets(at, lines, places, extent, OPERAND: tl.constexpr, STRIDED: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Offsets of a tile in memory from the start of its matrix, int64. CONTIGUOUS: lines lie in one piece."""
    count, length = extent
    if STRIDED and OPERAND != 2:
        line_offsets = walk_dims(at, field(at, LINE_DIMS), field32(at, LINE_NDIM), lines, OPERAND, 2)
        place_offsets = walk_dims(at, field(at, PLACE_DIMS), field32(at, PLACE_NDIM), places, OPERAND, 2)
        return line_offsets[:, None] + place_offsets[None, :]
    elif CONTIGUOUS:
        return lines.to(tl.int64)[:, None] * length + places[None, :]
    else:
        return places.to(tl.int64)[None, :] * count + lines[:, None]


@triton.jit
def load_x(
    g_ptrs, m_ptrs, mask, gradient, momentum,
    SKIP_NONFINITE: tl.constexpr, SIGN: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """(x, the new momentum) of a tile: what is normalized. The second counts where MOMENTUM is "before"."""
    _scale, clip_value, _clip_coef = gradient
    if SIGN or clip_value is not None:
        g = load_gradient(g_ptrs, mask, gradient, SKIP_NONFINITE)
    else:
        # a NaN or Inf shows in the sums of its line, and in the update
        g = load_gradient(g_ptrs, mask, gradient, False)
    x = g
    moved = g
    if MOMENTUM == "before":
        moved = g + momentum * tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
        x = moved
        if NESTEROV:
            x = g + momentum * moved
    if SIGN:
        x = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))
    return x, moved


@triton.jit
def scale_of(squares, count, old, eps, CLAMP: tl.constexpr):
    """sqrt(count) / norm, 0 where there is nothing. Where CLAMP, the norm of what ``old`` scales is at least eps."""
    if CLAMP:
        scale = tl.sqrt(count) / tl.maximum(tl.sqrt(squares), eps / old, propagate_nan=tl.PropagateNan.ALL)
    else:
        scale = tl.sqrt(count) * tl.rsqrt(squares)
    # what has overflowed is not to vanish
    return tl.where(squares < TINY, 0.0, scale + 0.0 * squares)


@triton.jit
def line_scales(
    at, e, lines, mask, squares, has_line, have_scales, eps,
    CLAMP: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Scales of lines of matrix e: of their sums of squares if ``has_line``, else as they were (1 if they were not)."""
    line = e.to(tl.int64) * field32(at, LINES) + lines
    old = tl.load(scratch(at, LINE_SCALE) + line, mask=mask & have_scales, other=1.0, cache_modifier=".cg")
    scale = tl.where(has_line, scale_of(squares, field32(at, LENGTH).to(tl.float32), old, eps, CLAMP), old)
    if HAS_THRESHOLD:
        norm = tl.load(scratch(at, LINE_NORM) + line, mask=mask, other=0.0, cache_modifier=".cg")
        scale = tl.where(norm >= tl.load(scratch(at, THRESHOLD) + e, cache_modifier=".cg"), scale, 0.0)
    return scale


@triton.jit
def cross_scales(at, e, places, mask, have_scales):
    """Scales of places of matrix e, 1 as long as there are none."""
    place = e.to(tl.int64) * field32(at, LENGTH) + places
    return tl.load(scratch(at, CROSS_SCALE) + place, mask=mask & have_scales, other=1.0, cache_modifier=".cg")
