"""Drawing projections: the device's twin of draw.py."""

import triton
import triton.language as tl

from ..draw import HALF_UNIT as _HALF_UNIT
from ..draw import UNIT as _UNIT

UNIT, HALF_UNIT = tl.constexpr(_UNIT), tl.constexpr(_HALF_UNIT)
_TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def integer_or_load(x):
    """An integer argument, or what a pointer to one int64 on the device points to, as int32."""
    if isinstance(x, tl.tensor) and x.dtype.is_ptr():
        return tl.load(x).to(tl.int32)
    else:
        return tl.full((), 0, tl.int32) + x


@triton.jit
def normals(first, second):
    """Two standard normal numbers of two words, by Box and Muller."""
    radius = tl.sqrt(-2.0 * tl.log((first >> 8).to(tl.float32) * UNIT + HALF_UNIT))
    angle = _TWO_PI * ((second >> 8).to(tl.float32) * UNIT + HALF_UNIT)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def sign(word):
    """1 or -1 by the highest bit."""
    return 1.0 - 2.0 * (word >> 31).to(tl.float32)


@triton.jit
def entries(key, quads, row, epoch, tag, SIGNS: tl.constexpr):
    """Entries 4 * quads .. 4 * quads + 3 of a row of a projection, fp32 with the digits of bfloat16."""
    zeros = quads * 0
    w0, w1, w2, w3 = tl.philox(key, quads, zeros + row, zeros + epoch, zeros + tag)
    if SIGNS:
        z0, z1, z2, z3 = sign(w0), sign(w1), sign(w2), sign(w3)
    else:
        z0, z1 = normals(w0, w1)
        z2, z3 = normals(w2, w3)
    # the last dimension of a join is the fastest: z0, z1, z2, z3
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return tl.reshape(z, (4 * quads.shape[0],)).to(tl.bfloat16).to(tl.float32)


@triton.jit(do_not_specialize=["epoch", "key", "length", "tag"])
def _projection_kernel(projection_ptr, drawn_ptr, epoch, key, length, tag, SIGNS: tl.constexpr, BLOCK: tl.constexpr):
    """Draw a projection of rows of ``length``, unless that of this epoch was drawn. One program writes part of a row.

    ``drawn_ptr`` says which epoch's it is; None: draw in any case.
    """
    now = integer_or_load(epoch)
    if drawn_ptr is not None:
        if tl.load(drawn_ptr).to(tl.int32) == now:
            return
    first = tl.program_id(0) * BLOCK
    row = tl.program_id(1)
    drawn = entries(key, first // 4 + tl.arange(0, BLOCK // 4), row, now, tag, SIGNS)
    place = first + tl.arange(0, BLOCK)
    tl.store(projection_ptr + row.to(tl.int64) * length + place, drawn.to(tl.bfloat16), mask=place < length)
