"""What the second moment makes of the gradient."""

import triton
import triton.language as tl

from ...field_fragments import field32, scratch
from ...fragments import lerp
from .constants import N


@triton.jit
def safe_rsqrt(x, SUBNORMAL: tl.constexpr):
    """1 / sqrt(x), and 0 for 0: a moment of 0 belongs to gradients that are 0, whose update is not 0 * Inf.

    tl.rsqrt takes subnormal numbers for 0, so that where they occur (SUBNORMAL) they are scaled by a power of 4.
    """
    if SUBNORMAL:
        scale = tl.where(x < 2.0**-100, 4096.0, 1.0)
        return tl.where(x > 0.0, tl.rsqrt(x * (scale * scale)) * scale, 0.0)
    else:
        return tl.where(x > 0.0, tl.rsqrt(x), 0.0)


@triton.jit
def weight_of(step, beta2_weight, decay_rate):
    """Weight of the new value in the second moment: constant, or step**decay_rate."""
    if beta2_weight is not None:
        return beta2_weight
    else:
        # fp64, for one number: in fp32 the exponential of a product is off by 1e-6 of itself
        return tl.exp(decay_rate * tl.log(step.to(tl.float64))).to(tl.float32)


@triton.jit
def full_moment(v, g, moments, EPS_FLOOR: tl.constexpr):
    """(new V, factor that makes g the update) of a moment kept in full."""
    weight, eps = moments
    if EPS_FLOOR:
        v = lerp(v, g * g, weight)
        return v, safe_rsqrt(tl.maximum(v, eps * eps), True)  # the square of a small eps is 0
    else:
        v = lerp(v, g * g + eps, weight)
        return v, safe_rsqrt(v, False)


@triton.jit
def factored_scale(row_scale, col_scale, eps, EPS_FLOOR: tl.constexpr):
    """Factor that makes a tile of g the update: 1 / sqrt(V), where the floor under V is eps²."""
    scale = row_scale[:, None] * col_scale[None, :]
    if EPS_FLOOR:
        scale = tl.minimum(scale, 1.0 / eps)
    return scale


@triton.jit
def row_scales(at, e, rows, NEW: tl.constexpr, MEAN: tl.constexpr, EPS_FLOOR: tl.constexpr):
    """(R, sqrt(mean(R) / R)) of the rows of matrix e, from the new R in the scratch."""
    n = field32(at, N)
    r = tl.load(scratch(at, NEW) + e.to(tl.int64) * n + rows, mask=rows < n, other=0.0, cache_modifier=".cg")
    mean = tl.load(scratch(at, MEAN) + e, cache_modifier=".cg")
    return r, tl.sqrt(mean) * safe_rsqrt(r, EPS_FLOOR)


@triton.jit
def col_scales(at, e, cols, m, SCALE: tl.constexpr):
    """1 / sqrt(C) of columns of matrix e, as the column phase left it in the scratch."""
    return tl.load(scratch(at, SCALE) + e.to(tl.int64) * m + cols, mask=cols < m, other=0.0, cache_modifier=".cg")


@triton.jit
def keep_columns(at, e, m, col_ptr, NEW: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Write the new C of matrix e, of which the scratch has a copy, into the state."""
    for col in range(0, m, BLOCK_COLS):
        cols = col + tl.arange(0, BLOCK_COLS)
        places = e.to(tl.int64) * m + cols
        c = tl.load(scratch(at, NEW) + places, mask=cols < m, other=0.0, cache_modifier=".cg")
        tl.store(col_ptr + places, c, mask=cols < m)
