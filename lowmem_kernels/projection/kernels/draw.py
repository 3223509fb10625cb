"""Drawing projections: the device's twin of draw.py, operation for operation."""

import triton
import triton.language as tl

from .. import normal as _normal

UNIT, HALF_UNIT = tl.constexpr(_normal.UNIT), tl.constexpr(_normal.HALF_UNIT)
ROOT_HALF, LN_2, HALF_PI = tl.constexpr(_normal.ROOT_HALF), tl.constexpr(_normal.LN_2), tl.constexpr(_normal.HALF_PI)
LOG_3, LOG_5, LOG_7, LOG_9 = [tl.constexpr(c) for c in _normal.LOG]
COS_4, COS_6, COS_8 = [tl.constexpr(c) for c in _normal.COS]
SIN_3, SIN_5, SIN_7, SIN_9 = [tl.constexpr(c) for c in _normal.SIN]


@triton.jit
def integer_or_load(x):
    """An integer argument, or what a pointer to one int64 on the device points to, as int32."""
    if isinstance(x, tl.tensor) and x.dtype.is_ptr():
        return tl.load(x).to(tl.int32)
    else:
        return tl.full((), 0, tl.int32) + x


@triton.jit
def logarithm(x):
    """The natural logarithm of normal numbers, to 2 units in the last place: bits, a division, and a polynomial."""
    bits = x.to(tl.int32, bitcast=True)
    # the mantissa as a number of [sqrt(1/2), sqrt(2)), and its exponent
    shifted = bits - ROOT_HALF
    exponent = shifted >> 23
    mantissa = ((shifted & 0x7FFFFF) + ROOT_HALF).to(tl.float32, bitcast=True)
    f = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    s = f * f
    series = ((s * LOG_9 + LOG_7) * s + LOG_5) * s + LOG_3
    return exponent.to(tl.float32) * LN_2 + (f * s * series + f) * 2.0


@triton.jit
def cosine_and_sine(turns):
    """(cos, sin) of 2 pi times numbers of [0, 1], to 2e-7."""
    quarters = (turns * 4.0 + 0.5).to(tl.int32)
    x = (turns * 4.0 - quarters.to(tl.float32)) * HALF_PI
    s = x * x
    cos = (((s * COS_8 + COS_6) * s + COS_4) * s - 0.5) * s + 1.0
    sin = (((s * SIN_9 + SIN_7) * s + SIN_5) * s + SIN_3) * s * x + x
    odd = (quarters & 1) == 1
    c = tl.where(odd, -sin, cos)
    s = tl.where(odd, cos, sin)
    upper = (quarters & 2) == 2
    return tl.where(upper, -c, c), tl.where(upper, -s, s)


@triton.jit
def normals(first, second):
    """Two standard normal numbers of two words, by Box and Muller."""
    radius = tl.sqrt_rn(-2.0 * logarithm((first >> 8).to(tl.float32) * UNIT + HALF_UNIT))
    cos, sin = cosine_and_sine((second >> 8).to(tl.float32) * UNIT)
    return radius * cos, radius * sin


@triton.jit
def sign(word):
    """1 or -1 by the highest bit."""
    return 1.0 - 2.0 * (word >> 31).to(tl.float32)


@triton.jit
def four_entries(key, quads, row, epoch, tag, SIGNS: tl.constexpr):
    """Entries 4 * quads, ..., 4 * quads + 3 of a row of a projection, fp32, before they are rounded."""
    zeros = quads * 0
    w0, w1, w2, w3 = tl.philox(key, quads, zeros + row, zeros + epoch, zeros + tag)
    if SIGNS:
        z0, z1, z2, z3 = sign(w0), sign(w1), sign(w2), sign(w3)
    else:
        z0, z1 = normals(w0, w1)
        z2, z3 = normals(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def entries(key, quads, row, epoch, tag, SIGNS: tl.constexpr):
    """Entries 4 * quads .. 4 * quads + 3 of a row of a projection, fp32 with the digits of bfloat16."""
    z0, z1, z2, z3 = four_entries(key, quads, row, epoch, tag, SIGNS)
    # the last dimension of a join is the fastest: z0, z1, z2, z3
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return tl.reshape(z, (4 * quads.shape[0],)).to(tl.bfloat16).to(tl.float32)


@triton.jit
def entries_at(key, places, row, epoch, tag, SIGNS: tl.constexpr):
    """Entries at any places of a row, as `entries`; each draws four of which it takes one."""
    z0, z1, z2, z3 = four_entries(key, places // 4, row, epoch, tag, SIGNS)
    which = places % 4
    z = tl.where(which < 2, tl.where(which == 0, z0, z1), tl.where(which == 2, z2, z3))
    return z.to(tl.bfloat16).to(tl.float32)


@triton.jit(do_not_specialize=["epoch", "key", "length", "tag", "first_row", "run", "distance"])
def _projection_kernel(
    projection_ptr, drawn_ptr, epoch, key, length, tag, first_row, run, distance,
    SIGNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw a projection of rows of ``length``, unless that of this epoch was drawn. One program writes part of a row.

    ``drawn_ptr`` says which epoch's it is; None: draw in any case. Of a piece's contracted rows, their `RowPlace` says
    which of the whole they are; None: all.
    """
    now = integer_or_load(epoch)
    if drawn_ptr is not None:
        if tl.load(drawn_ptr).to(tl.int32) == now:
            return
    first = tl.program_id(0) * BLOCK
    row = tl.program_id(1)
    if run is None:
        drawn = entries(key, first // 4 + tl.arange(0, BLOCK // 4), row, now, tag, SIGNS)
    else:
        here = first + tl.arange(0, BLOCK)
        drawn = entries_at(key, first_row + here // run * distance + here % run, row, now, tag, SIGNS)
    place = first + tl.arange(0, BLOCK)
    tl.store(projection_ptr + row.to(tl.int64) * length + place, drawn.to(tl.bfloat16), mask=place < length)
