"""Triton kernels of the whitening family. README.md beside this file has the picture and the bytes.

X, the normalised gradient, is made of G wherever a tile of G is read, and is nowhere else. ``at`` is (table_ptr,
row_ptr, addresses_ptr): the table of schedule.py, the matrix's row in it, and the addresses of the parameters.
"""

import triton
import triton.language as tl

from ..field_fragments import field, field32
from ..fragments import count_skipped, find_owner, is_finite, rounded, scalar_or, stream_key, transformed
from .schedule import COLUMNS as _COLUMNS
from .schedule import FIELDS as _FIELDS
from .solver import TINY as _TINY

_FIELD_COUNT, _COLUMN_COUNT, _SMALLEST = tl.constexpr(len(_FIELDS)), tl.constexpr(len(_COLUMNS)), tl.constexpr(_TINY)
_OWNER, _KEY, _M, _N, _START, _FIRST_ROW, _STATS_TILE, _APPLY_TILE = [tl.constexpr(i) for i in range(8)]
# of the parameter; those of the gradient come after them
_OFFSET, _ROW_STRIDE, _COLUMN_OFFSETS = tl.constexpr(8), tl.constexpr(10), tl.constexpr(12)
_STEP = tl.constexpr(2)


@triton.jit
def _matrix(table_ptr, addresses_ptr, matrix):
    """``at`` of a matrix of the table."""
    return table_ptr, table_ptr + tl.full((), 0, tl.int64) + matrix * _FIELD_COUNT, addresses_ptr


@triton.jit
def _sides(at, ALIGNED: tl.constexpr):
    """(m, n), int32. Where ALIGNED n is a product by 8, so that the compiler can prove that no mask cuts a vector."""
    n = field32(at, _N)
    if ALIGNED:
        n = (n // 8) * 8
    return field32(at, _M), n


@triton.jit
def _pointer(at, OPERAND: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the matrix starts in the parameter (OPERAND 0) or the gradient (1)."""
    _, _, addresses_ptr = at
    address = tl.load(addresses_ptr + field(at, _OWNER) * _COLUMN_COUNT + OPERAND)
    pointer = address.to(tl.pointer_type(DTYPE)) + field(at, _OFFSET + OPERAND)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _offsets(at, rows, cols, n, OPERAND: tl.constexpr, STRIDED: tl.constexpr):
    """Offsets of a tile from where the matrix starts, int64."""
    if STRIDED:
        table_ptr, _, _ = at
        columns_ptr = table_ptr + field(at, _COLUMN_OFFSETS + OPERAND)
        columns = tl.load(columns_ptr + cols, mask=cols < n, other=0)
        return rows.to(tl.int64)[:, None] * field(at, _ROW_STRIDE + OPERAND) + columns[None, :]
    else:
        return rows.to(tl.int64)[:, None] * n + cols[None, :]


@triton.jit
def _gradient_tile(at, g_ptr, rows, cols, sides, gradient, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr):
    """(g, mask): the gradient as options.GradTransform says, NaN where it may not be used, so that every sum shows it.

    0 outside of the matrix.
    """
    m, n = sides
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    grad = tl.load(g_ptr + _offsets(at, rows, cols, n, 1, STRIDED), mask=mask, other=0.0)
    g, usable = transformed(grad, gradient, SKIP_NONFINITE)
    return tl.where(usable, g, float("nan")), mask


@triton.jit
def _x_tile(
    at, g_ptr, stats_ptr, all_rows, rows, cols, sides, gradient, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr
):
    """A tile of X; 0 outside of the matrix."""
    g, mask = _gradient_tile(at, g_ptr, rows, cols, sides, gradient, STRIDED, SKIP_NONFINITE)
    row_ptr = stats_ptr + field(at, _FIRST_ROW) + rows
    m, _ = sides
    mean = tl.load(row_ptr, mask=rows < m, other=0.0)
    factor = tl.load(row_ptr + all_rows, mask=rows < m, other=0.0)
    return tl.where(mask, (g - mean[:, None]) * factor[:, None], 0.0)


@triton.jit(do_not_specialize=["matrices", "all_rows"])
def _row_stats_kernel(
    table_ptr, addresses_ptr, stats_ptr, bad_ptr, matrices, all_rows,
    scale, inv_scale, clip_value, clip_coef,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    CENTRE: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and factor of each row. One program owns BLOCK_M rows of one matrix.

    It writes them, and sets the flag of a parameter whose sums are not finite. Where rows are centred they are swept
    twice, the second time from a cache: the mean is taken of distances from the row's first element, and the variance
    of distances from the mean, so that a constant row has none and nothing cancels.
    """
    tile = tl.program_id(0)
    at = _matrix(table_ptr, addresses_ptr, find_owner(table_ptr, 0, matrices, tile, _FIELD_COUNT, _STATS_TILE))
    sides = _sides(at, ALIGNED)
    m, n = sides
    g_ptr = _pointer(at, 1, GRAD, ALIGNED)
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))
    rows = (tile - field(at, _STATS_TILE)).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)

    mean = tl.zeros((BLOCK_M,), tl.float32)
    if CENTRE:
        first, _ = _gradient_tile(at, g_ptr, rows, tl.arange(0, 1), sides, gradient, STRIDED, SKIP_NONFINITE)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for col in range(0, n, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            g, mask = _gradient_tile(at, g_ptr, rows, cols, sides, gradient, STRIDED, SKIP_NONFINITE)
            sums += tl.where(mask, g - first, 0.0)
        mean = tl.sum(first, 1) + tl.sum(sums, 1) / n
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for col in range(0, n, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        g, mask = _gradient_tile(at, g_ptr, rows, cols, sides, gradient, STRIDED, SKIP_NONFINITE)
        x = tl.where(mask, g - mean[:, None], 0.0)
        squares += x * x
    square = tl.sum(squares, 1) / n
    factor = tl.full((BLOCK_M,), 1.0, tl.float32)
    if NORMALIZE:
        # the product makes NaN of an Inf, of which the root would make a row of zeros
        factor = tl.where(square < _SMALLEST, 0.0, tl.rsqrt(square + 0.0 * square))

    row_ptr = stats_ptr + field(at, _FIRST_ROW) + rows
    tl.store(row_ptr, mean, mask=rows < m)
    tl.store(row_ptr + all_rows, factor, mask=rows < m)
    if SKIP_NONFINITE:
        # times m, so that the sum over all rows is finite too
        bad = (rows < m) & (is_finite(square * n * m) == 0)
        if tl.sum(bad.to(tl.int32)) > 0:
            tl.store(bad_ptr + field(at, _OWNER), 1)


@triton.jit(do_not_specialize=["first", "all_rows"])
def _gram_kernel(
    table_ptr, addresses_ptr, stats_ptr, gram_ptr, first, size, all_rows,
    scale, inv_scale, clip_value, clip_coef,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    RIGHT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X^T X where RIGHT, else X X^T. One program owns a BLOCK x BLOCK tile of one matrix's, not above the diagonal.

    It writes the tile and its mirror image.
    """
    blocks = tl.cdiv(size, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    index = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    # the row of tiles whose first is tile r (r + 1) / 2; the root may be off by a unit in the last place
    r = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    r = tl.where(r * (r + 1) // 2 > tile, r - 1, r)
    r = tl.where((r + 1) * (r + 2) // 2 <= tile, r + 1, r)
    c = tile - r * (r + 1) // 2

    at = _matrix(table_ptr, addresses_ptr, first + index)
    sides = _sides(at, ALIGNED)
    m, n = sides
    g_ptr = _pointer(at, 1, GRAD, ALIGNED)
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))
    left = r * BLOCK + tl.arange(0, BLOCK)
    right = c * BLOCK + tl.arange(0, BLOCK)
    gram = tl.zeros((BLOCK, BLOCK), tl.float32)
    if RIGHT:
        for k in range(0, m, BLOCK_K):
            rows = k + tl.arange(0, BLOCK_K)
            a = _x_tile(at, g_ptr, stats_ptr, all_rows, rows, left, sides, gradient, STRIDED, SKIP_NONFINITE)
            b = _x_tile(at, g_ptr, stats_ptr, all_rows, rows, right, sides, gradient, STRIDED, SKIP_NONFINITE)
            gram = tl.dot(tl.trans(a), b, gram, input_precision=PRECISION)
    else:
        for k in range(0, n, BLOCK_K):
            cols = k + tl.arange(0, BLOCK_K)
            a = _x_tile(at, g_ptr, stats_ptr, all_rows, left, cols, sides, gradient, STRIDED, SKIP_NONFINITE)
            b = _x_tile(at, g_ptr, stats_ptr, all_rows, right, cols, sides, gradient, STRIDED, SKIP_NONFINITE)
            gram = tl.dot(a, tl.trans(b), gram, input_precision=PRECISION)

    out_ptr = gram_ptr + index.to(tl.int64) * size * size
    tl.store(out_ptr + left.to(tl.int64)[:, None] * size + right[None, :], gram,
             mask=(left < size)[:, None] & (right < size)[None, :])  # fmt: skip
    if r != c:
        tl.store(out_ptr + right.to(tl.int64)[:, None] * size + left[None, :], tl.trans(gram),
                 mask=(right < size)[:, None] & (left < size)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["first", "count", "first_tile", "all_rows"])
def _whiten_apply_kernel(
    table_ptr, addresses_ptr, stats_ptr, bad_ptr, root_ptr, inverse_ptr, found_inf,
    first, count, first_tile, size, all_rows, lr, update_scale, weight_decay,
    scale, inv_scale, clip_value, clip_coef,
    PARAM: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr, UPDATE: tl.constexpr,
    RIGHT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p -= lr (update_scale D + weight_decay p) where UPDATE, else p = D. One program owns BLOCK x BLOCK elements of p.

    D is X Z where RIGHT, else Z X, times what makes its root mean square 1.
    """
    tile = first_tile + tl.program_id(0)
    matrix = find_owner(table_ptr, first, first + count, tile, _FIELD_COUNT, _APPLY_TILE)
    at = _matrix(table_ptr, addresses_ptr, matrix)
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    if SKIP_NONFINITE:
        if tl.load(bad_ptr + field(at, _OWNER)) != 0:
            return
    sides = _sides(at, ALIGNED)
    m, n = sides
    g_ptr = _pointer(at, 1, GRAD, ALIGNED)
    p_ptr = _pointer(at, 0, PARAM, ALIGNED)
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))
    # programs beside each other share the part of X that they read, and the root comes from the L2 cache
    place = (tile - field(at, _APPLY_TILE)).to(tl.int32)
    if RIGHT:
        across = tl.cdiv(n, BLOCK)
        rows = (place // across) * BLOCK + tl.arange(0, BLOCK)
        cols = (place % across) * BLOCK + tl.arange(0, BLOCK)
    else:
        down = tl.cdiv(m, BLOCK)
        rows = (place % down) * BLOCK + tl.arange(0, BLOCK)
        cols = (place // down) * BLOCK + tl.arange(0, BLOCK)
    index = (matrix - first).to(tl.int64)
    z_ptr = root_ptr + index * size * size
    update = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, size, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        if RIGHT:
            x = _x_tile(at, g_ptr, stats_ptr, all_rows, rows, inner, sides, gradient, STRIDED, SKIP_NONFINITE)
            z = tl.load(z_ptr + inner.to(tl.int64)[:, None] * size + cols[None, :],
                        mask=(inner < size)[:, None] & (cols < size)[None, :], other=0.0)  # fmt: skip
            update = tl.dot(x, z, update, input_precision=PRECISION)
        else:
            x = _x_tile(at, g_ptr, stats_ptr, all_rows, inner, cols, sides, gradient, STRIDED, SKIP_NONFINITE)
            z = tl.load(z_ptr + rows.to(tl.int64)[:, None] * size + inner[None, :],
                        mask=(rows < size)[:, None] & (inner < size)[None, :], other=0.0)  # fmt: skip
            update = tl.dot(z, x, update, input_precision=PRECISION)
    factor = tl.load(inverse_ptr + index) * tl.sqrt(m.to(tl.float32) * n)

    mask = (rows < m)[:, None] & (cols < n)[None, :]
    p_ptrs = p_ptr + _offsets(at, rows, cols, n, 0, STRIDED)
    if UPDATE:
        _, _, addresses_ptr = at
        step_ptr = tl.load(addresses_ptr + field(at, _OWNER) * _COLUMN_COUNT + _STEP).to(tl.pointer_type(tl.float32))
        key = stream_key(field(at, _KEY), tl.load(step_ptr) + 1.0, 0)
        rate = scalar_or(lr, 0.0)
        p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
        new_p = p - (rate * update_scale * factor * update + rate * weight_decay * p)
        start = field(at, _START) + rows.to(tl.int64)[:, None] * n
        tl.store(p_ptrs, rounded(new_p, key, start, cols[None, :], PARAM, STOCHASTIC), mask=mask)
    else:
        tl.store(p_ptrs, factor * update, mask=mask)


@triton.jit(do_not_specialize=["owners"])
def _advance_kernel(addresses_ptr, bad_ptr, skipped_ptr, found_inf, owners, BLOCK: tl.constexpr):
    """End of a call: one program owns BLOCK parameters, and advances their steps, or counts them as skipped."""
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    owner = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bad = tl.load(bad_ptr + owner, mask=owner < owners, other=0)
    address = tl.load(addresses_ptr + owner.to(tl.int64) * _COLUMN_COUNT + _STEP, mask=owner < owners, other=0)
    step_ptrs = address.to(tl.pointer_type(tl.float32))
    moves = (owner < owners) & (bad == 0)
    tl.store(step_ptrs, tl.load(step_ptrs, mask=moves, other=0.0) + 1.0, mask=moves)
    count_skipped(skipped_ptr, tl.sum(bad))
