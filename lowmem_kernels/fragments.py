"""Arithmetic and table walking that kernels share. Only @triton.jit functions; nothing here reads or writes results."""

import triton
import triton.language as tl

from .rounding import GOLDEN_RATIO, MULTIPLIER_1, MULTIPLIER_2
from .table import HEADER

_MULTIPLIER_1 = tl.constexpr(MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(MULTIPLIER_2)
_GOLDEN_RATIO = tl.constexpr(GOLDEN_RATIO)
_HEADER = tl.constexpr(HEADER)


@triton.jit
def scalar_or(x, default: tl.constexpr):
    """A scalar argument that is absent (None), a number, or a pointer to one fp32 on the device."""
    if x is None:
        return default
    elif isinstance(x, tl.tensor) and x.dtype.is_ptr():
        return tl.load(x).to(tl.float32)
    else:
        return x  # in the interpreter a float is a Python number


@triton.jit
def find_owner(table_ptr, first, end, tile, WIDTH: tl.constexpr, FIELD: tl.constexpr):
    """The row that owns a tile, by bisection: the last of first .. end - 1 whose FIELD, its first tile, is not above.

    Rows have WIDTH numbers.
    """
    low = first
    high = end
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table_ptr + middle.to(tl.int64) * WIDTH + FIELD) <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def find_row(table_ptr, rows, tile, COLUMNS: tl.constexpr):
    """(row_ptr, row) of the row of a table of table.py that owns a tile."""
    row = find_owner(table_ptr, 0, rows, tile, _HEADER + COLUMNS, 0)
    return table_ptr + row.to(tl.int64) * (_HEADER + COLUMNS), row


@triton.jit
def address(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer in a column of the row. Its 16-byte alignment must be promised: it cannot be seen in a loaded integer."""
    pointer = tl.load(row_ptr + _HEADER + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def tile_bounds(row_ptr, tile, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """(start, end, vector_end, numel) of the elements of a tile, all int64.

    Where ALIGNED, vector_end is numel rounded down to whole vectors of eight, as a product, so that the compiler can
    prove that a mask never cuts a vector; the caller does the rest apart. Otherwise it is numel.
    """
    numel = tl.load(row_ptr + 1)
    start = (tile - tl.load(row_ptr)) * TILE
    vector_end = (numel // 8) * 8 if ALIGNED else numel
    return start, tl.minimum(start + TILE, numel), vector_end, numel


@triton.jit
def elements(pointer, table_ptr, row_ptr, start, lane, OPERAND: tl.constexpr, STRIDED: tl.constexpr):
    """Pointers to logical elements start + lane of column ``OPERAND``; only 0 and 1 can be STRIDED."""
    if STRIDED:
        dims_ptr = table_ptr + tl.load(row_ptr + 3)
        # unsigned, because a signed 64-bit division takes twice the instructions
        index = (start + lane).to(tl.uint64)
        offset = tl.zeros(lane.shape, tl.int64)
        for dim in range(tl.load(row_ptr + 4).to(tl.int32)):
            size = tl.load(dims_ptr + 3 * dim).to(tl.uint64)
            outer = index // size
            offset += (index - outer * size).to(tl.int64) * tl.load(dims_ptr + 3 * dim + 1 + OPERAND)
            index = outer
        return pointer + offset
    else:
        # 64 bits move the base once; the lanes need no more than 32
        return pointer + start + lane


@triton.jit
def mix32(word):
    """Avalanche hash of uint32 words, the twin of rounding.mix32."""
    word ^= word >> 16
    word *= _MULTIPLIER_1
    word ^= word >> 15
    word *= _MULTIPLIER_2
    return word ^ (word >> 16)


@triton.jit
def combine(key, word):
    """Fold a uint32 word into a uint32 key, the twin of rounding.combine."""
    return mix32((key ^ word) + _GOLDEN_RATIO)


@triton.jit
def stream_key(key, step, STREAM: tl.constexpr):
    """Key of one write of a parameter at ``step`` (fp32, from 1), of its tensor_key; twin of rounding.stream_key."""
    key = combine(key.to(tl.uint32), step.to(tl.int32).to(tl.uint32))
    return combine(key, tl.full((), STREAM, tl.uint32))


@triton.jit
def place_in_whole(table_ptr, row_ptr, start, lane, DIGITS: tl.constexpr):
    """Where in the whole elements start + lane of a shard are: start there, or with 2 DIGITS the index of each element.

    `rounded` takes it in place of start, and of both.
    """
    if DIGITS == 0:
        return start
    elif DIGITS == 1:
        return start + tl.load(table_ptr + tl.load(row_ptr + 3) + 3 * tl.load(row_ptr + 4))
    else:
        # after (size, stride, stride) of each dimension, where there are any
        shard_ptr = table_ptr + tl.load(row_ptr + 3) + 3 * tl.load(row_ptr + 4)
        index = (start + lane).to(tl.uint64)
        place = tl.zeros(lane.shape, tl.int64) + tl.load(shard_ptr)
        for digit in range(tl.load(shard_ptr + 2).to(tl.int32)):
            size = tl.load(shard_ptr + 3 + 2 * digit).to(tl.uint64)
            outer = index // size
            place += (index - outer * size).to(tl.int64) * tl.load(shard_ptr + 4 + 2 * digit)
            index = outer
        return place + index.to(tl.int64) * tl.load(shard_ptr + 1)


@triton.jit
def rounding_noise(key, start, lane):
    """uint32 noise, 0 .. 65535, of elements start + lane (int64 and int32, broadcast), the twin of rounding.noise.

    Without ``lane``, of elements start, which are in any order.
    """
    if lane is None:
        word = mix32((start >> 1).to(tl.uint32) ^ combine(key, (start >> 33).to(tl.uint32)))
        return (word >> ((start & 1) * 16).to(tl.uint32)) & 0xFFFF
    else:
        start = tl.full((), 0, tl.int64) + start  # a loop counter is a Python number in the interpreter
        lane += (start & 1).to(tl.int32)
        low = (start >> 1).to(tl.uint32)
        pair = low + (lane >> 1).to(tl.uint32)
        high = (start >> 33).to(tl.uint32)
        # the sum of 32 bits may wrap around, into the next value of the high word
        word = mix32(pair ^ tl.where(pair < low, combine(key, high + 1), combine(key, high)))
        return (word >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def rounded(x, key, start, lane, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """fp32 ``x`` in DTYPE: rounded once, to nearest or (bfloat16 only) stochastically. NaN and Inf pass through."""
    if STOCHASTIC and DTYPE == tl.bfloat16:
        bits = (x.to(tl.uint32, bitcast=True) + rounding_noise(key, start, lane)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def is_finite(x):
    """Neither NaN nor Inf."""
    return tl.abs(x) < float("inf")


@triton.jit
def transformed(grad, gradient, SKIP_NONFINITE: tl.constexpr):
    """(g, usable): the gradient read as options.GradTransform says, and which elements may be used.

    ``gradient`` is (±inv_scale, clip_value or None, clip_coef).
    """
    scale, clip_value, clip_coef = gradient
    unscaled = grad.to(tl.float32) * scale
    g = unscaled
    if clip_value is not None:
        g = tl.minimum(g, clip_value, propagate_nan=tl.PropagateNan.ALL)
        g = tl.maximum(g, -clip_value, propagate_nan=tl.PropagateNan.ALL)
    g *= clip_coef
    if SKIP_NONFINITE:
        usable = is_finite(unscaled) & is_finite(g)
    else:
        usable = tl.full(g.shape, 1, tl.int1)
    return g, usable


@triton.jit
def load_gradient(pointers, mask, gradient, SKIP_NONFINITE: tl.constexpr):
    """The gradient as options.GradTransform says; NaN where it may not be used, so that every sum shows it."""
    g, usable = transformed(tl.load(pointers, mask=mask, other=0.0), gradient, SKIP_NONFINITE)
    return tl.where(usable, g, float("nan"))


@triton.jit
def lerp(x, y, weight):
    """x + weight (y - x), and y for the weight 1, where a small y would vanish in y - x."""
    x = tl.where(weight == 1.0, 0.0, x)
    return x + weight * (y - x)


@triton.jit
def one_minus_power(log_base, exponent):
    """1 - base**exponent = -expm1(exponent * log(base)) to fp32 accuracy, also where base**exponent is close to 1.

    Above -ln 2 a Taylor series whose first omitted term is 1e-9 of the sum, since there the subtraction would cancel.
    """
    x = exponent * log_base
    series = 1.0 + x / 10.0
    for n in tl.static_range(8):
        series = 1.0 + series * x / (9.0 - n)
    return tl.where(x > -0.6931, -x * series, 1.0 - tl.exp(x))


@triton.jit
def count_skipped(skipped_ptr, count):
    """Add this program's number of skipped elements to the counter on the device, if there is one."""
    if skipped_ptr is not None:
        if count > 0:
            tl.atomic_add(skipped_ptr, count.to(tl.int64), sem="relaxed")


@triton.jit
def programs_of(numel, TILE: tl.constexpr):
    """How many programs a tensor of ``numel`` elements has, as table.py counts them: an empty one has one."""
    return tl.maximum((numel + TILE - 1) // TILE, 1)


@triton.jit
def is_last_program(counter_ptr, programs):
    """Count this program as done; true in the last of ``programs`` to come here, which puts the counter back to 0."""
    # what all threads of this program have read and written comes before its arrival
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
