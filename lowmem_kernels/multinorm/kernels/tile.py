"""Reading x, and the scale that a norm makes."""

import triton
import triton.language as tl

from ...field_fragments import field32, scratch
from ...fragments import load_gradient
from ...line_fragments import LENGTH, LINES
from .constants import CROSS_SCALE, LINE_NORM, LINE_SCALE, THRESHOLD, TINY


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
