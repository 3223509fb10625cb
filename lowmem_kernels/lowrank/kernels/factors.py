"""The low-rank factors: products with the gradient, sums of its squares, small problems, new factors.

The scratch holds Y [m, r] and B [r, n] of each matrix, which the last kernel here exchanges for L and R. A problem has
four small matrices: those that make B of Y^T G and of R, and those that make L of Y and R of B.
"""

import triton
import triton.language as tl

from ...field_fragments import field, field32
from ...fragments import is_finite, scalar_or
from ..solver import DEPENDENT as _DEPENDENT
from ..solver import TINY as _TINY
from .matrices import (
    COL_BLOCK,
    FIRST_COL,
    FIRST_ROW,
    LEFT,
    LEFT_SCRATCH,
    LEFT_STATE,
    OWNER,
    RANKS,
    RIGHT,
    RIGHT_SCRATCH,
    RIGHT_STATE,
    ROW_BLOCK,
    STEP,
    M,
    N,
    address_of,
    find_matrix,
    gradient_tile,
    left_tile,
    matrix_at,
    offset_of,
    right_tile,
    sides,
    small,
)

_DEPENDENT_SHARE, _SMALLEST = tl.constexpr(_DEPENDENT), tl.constexpr(_TINY)
_FROM_PRODUCT, _FROM_RIGHT, _TO_LEFT, _TO_RIGHT = [tl.constexpr(i) for i in range(4)]


@triton.jit
def _is_power_step(at, every):
    """Whether R moves in this step."""
    return tl.load(address_of(at, STEP, tl.float32, False)).to(tl.int32) % every == 0


@triton.jit
def _damping_of(at, damping):
    """How far this step goes. The first one goes all the way, or R at the start would be part of the momentum."""
    return tl.where(tl.load(address_of(at, STEP, tl.float32, False)) == 0.0, 1.0, damping)


@triton.jit(do_not_specialize=["matrices"])
def _row_pass_kernel(
    table_ptr, addresses_ptr, left_ptr, row_sums_ptr, bad_ptr, found_inf, matrices, pull,
    scale, inv_scale, clip_value, clip_coef,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    LOWRANK: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of squares of rows, and Y = pull G R^T + (1 - pull) L where LOWRANK. One program owns BLOCK_M rows.

    It sets the flag of a parameter whose sums are not finite.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    block = tl.program_id(0)
    at = matrix_at(table_ptr, addresses_ptr, find_matrix(table_ptr, matrices, block, ROW_BLOCK))
    shape = sides(at, ALIGNED)
    m, n = shape
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))
    rows = (block - field(at, ROW_BLOCK)).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    if LOWRANK:
        rank = field32(at, RANKS)
        right_ptr = address_of(at, RIGHT_STATE, tl.float32, ALIGNED) + offset_of(at, RIGHT, ALIGNED)
        product = tl.zeros((BLOCK_M, RANK), tl.float32)
    for col in range(0, n, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        g, _ = gradient_tile(at, rows, cols, shape, gradient, GRAD, ALIGNED, STRIDED, SKIP_NONFINITE)
        squares += tl.sum(g * g, 1)
        if LOWRANK:
            right_ptrs, right_mask = right_tile(right_ptr, cols, n, rank, RANK)
            right = tl.load(right_ptrs, mask=right_mask, other=0.0)
            product = tl.dot(g, tl.trans(right), product, input_precision=PRECISION)
    tl.store(row_sums_ptr + field(at, FIRST_ROW) + rows, squares, mask=rows < m)
    if LOWRANK:
        old_ptrs, mask = left_tile(address_of(at, LEFT_STATE, tl.float32, False) + field(at, LEFT), rows, m, rank, RANK)
        new_ptrs, _ = left_tile(left_ptr + field(at, LEFT_SCRATCH), rows, m, rank, RANK)
        old = tl.load(old_ptrs, mask=mask, other=0.0)
        tl.store(new_ptrs, pull * product + (1.0 - pull) * old, mask=mask)
    if SKIP_NONFINITE:
        if tl.sum(((rows < m) & (is_finite(squares) == 0)).to(tl.int32)) > 0:
            tl.store(bad_ptr + field(at, OWNER), 1)


@triton.jit(do_not_specialize=["matrices", "every"])
def _col_pass_kernel(
    table_ptr, addresses_ptr, left_ptr, right_ptr, small_ptr, col_sums_ptr, bad_ptr, found_inf, matrices, every,
    one_minus_beta1, damping, scale, inv_scale, clip_value, clip_coef,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    LOWRANK: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of squares of columns where SUMS, and B of Y^T G and R where LOWRANK. One program owns BLOCK_N columns.

    It sets the flag of a parameter whose sums are not finite.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    block = tl.program_id(0)
    matrix = find_matrix(table_ptr, matrices, block, COL_BLOCK)
    at = matrix_at(table_ptr, addresses_ptr, matrix)
    if SKIP_NONFINITE:
        if tl.load(bad_ptr + field(at, OWNER)) != 0:
            return
    if LOWRANK and not SUMS:
        if _is_power_step(at, every) == 0:
            return
    shape = sides(at, ALIGNED)
    m, n = shape
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))
    cols = (block - field(at, COL_BLOCK)).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    if LOWRANK:
        rank = field32(at, RANKS)
        product = tl.zeros((RANK, BLOCK_N), tl.float32)
    for row in range(0, m, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        g, _ = gradient_tile(at, rows, cols, shape, gradient, GRAD, ALIGNED, STRIDED, SKIP_NONFINITE)
        if SUMS:
            squares += tl.sum(g * g, 0)
        if LOWRANK:
            ptrs, mask = left_tile(left_ptr + field(at, LEFT_SCRATCH), rows, m, rank, RANK)
            left = tl.load(ptrs, mask=mask, other=0.0)
            product = tl.dot(tl.trans(left), g, product, input_precision=PRECISION)
    if SUMS:
        tl.store(col_sums_ptr + field(at, FIRST_COL) + cols, squares, mask=cols < n)
        if SKIP_NONFINITE:
            if tl.sum(((cols < n) & (is_finite(squares) == 0)).to(tl.int32)) > 0:
                tl.store(bad_ptr + field(at, OWNER), 1)
    if LOWRANK:
        old_ptrs, mask = right_tile(
            address_of(at, RIGHT_STATE, tl.float32, ALIGNED) + offset_of(at, RIGHT, ALIGNED), cols, n, rank, RANK
        )
        new_ptrs, _ = right_tile(right_ptr + offset_of(at, RIGHT_SCRATCH, ALIGNED), cols, n, rank, RANK)
        old = tl.load(old_ptrs, mask=mask, other=0.0)
        from_product = tl.load(small(small_ptr, matrix, _FROM_PRODUCT, RANK))
        pull = _damping_of(at, damping) * one_minus_beta1
        core = tl.dot(from_product, pull * product, input_precision=PRECISION)
        core = tl.dot(tl.load(small(small_ptr, matrix, _FROM_RIGHT, RANK)), old, core, input_precision=PRECISION)
        # a row of Q^T A that is not there makes room for one of R: Q has zeros, so that no product notices
        core = tl.where((tl.sum(from_product * from_product, 1) > 0.0)[:, None], core, old)
        tl.store(new_ptrs, core, mask=mask)


@triton.jit
def _triangular(gram, rank, RANK: tl.constexpr):
    """(C, inverse of C), as solver.triangular. A loop of unknown length, since one of known length is unrolled."""
    lane = tl.arange(0, RANK)
    i = lane[:, None]
    j = lane[None, :]
    size = tl.sum(tl.where(i == j, gram, 0.0), 1)
    rest = gram
    lower = tl.zeros((RANK, RANK), tl.float32)
    inverse = tl.zeros((RANK, RANK), tl.float32)
    for k in range(0, rank):
        column = tl.sum(tl.where(j == k, rest, 0.0), 1)
        pivot = tl.sum(tl.where(lane == k, column, 0.0))
        share = tl.sum(tl.where(lane == k, size, 0.0)) * _DEPENDENT_SHARE
        live = (pivot > share) & (pivot > _SMALLEST)
        root = tl.sqrt(tl.where(live, pivot, 1.0))
        column = tl.where(live, tl.where(lane >= k, column / root, 0.0), 0.0)
        rest -= column[:, None] * tl.trans(column[:, None])
        lower = tl.where(j == k, column[:, None], lower)
        # row k of C, whose last element is the root
        row = tl.sum(tl.where(i == k, lower, 0.0), 0)
        known = tl.sum(tl.trans(row[None, :]) * inverse, 0)
        solved = tl.where(live, (tl.where(lane == k, 1.0, 0.0) - known) / root, 0.0)
        inverse = tl.where(i == k, solved[None, :], inverse)
    return lower, inverse


@triton.jit
def _reloaded(pointers, x):
    """x by way of memory. In the layout that a product leaves, `_triangular` takes minutes to compile, and spills."""
    tl.debug_barrier()
    tl.store(pointers, x)
    tl.debug_barrier()
    return tl.load(pointers)


@triton.jit(do_not_specialize=["every"])
def _left_problem_kernel(
    table_ptr, addresses_ptr, left_ptr, small_ptr, bad_ptr, found_inf, every, damping, beta1,
    SKIP_NONFINITE: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Orthogonalize Y: with Y^T Y = C C^T, Q = Y C^-T. One program owns a matrix.

    It writes what makes ``B = Q^T ((1 - damping) Y R + damping A)`` of Y^T G and of R.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    matrix = tl.program_id(0)
    at = matrix_at(table_ptr, addresses_ptr, matrix)
    if SKIP_NONFINITE:
        if tl.load(bad_ptr + field(at, OWNER)) != 0:
            return
    if _is_power_step(at, every) == 0:
        return
    m = field32(at, M)
    rank = field32(at, RANKS)
    gram = tl.zeros((RANK, RANK), tl.float32)
    cross = tl.zeros((RANK, RANK), tl.float32)
    for row in range(0, m, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        y_ptrs, mask = left_tile(left_ptr + field(at, LEFT_SCRATCH), rows, m, rank, RANK)
        l_ptrs, _ = left_tile(address_of(at, LEFT_STATE, tl.float32, False) + field(at, LEFT), rows, m, rank, RANK)
        y = tl.load(y_ptrs, mask=mask, other=0.0)
        left = tl.load(l_ptrs, mask=mask, other=0.0)
        gram = tl.dot(tl.trans(y), y, gram, input_precision=PRECISION)
        cross = tl.dot(tl.trans(y), left, cross, input_precision=PRECISION)
    damping = _damping_of(at, damping)
    cross_ptrs = small(small_ptr, matrix, _FROM_RIGHT, RANK)
    tl.store(cross_ptrs, damping * beta1 * cross)
    lower, inverse = _triangular(_reloaded(small(small_ptr, matrix, _TO_LEFT, RANK), gram), rank, RANK)
    inverse = _reloaded(small(small_ptr, matrix, _FROM_PRODUCT, RANK), inverse)
    kept = tl.dot(inverse, tl.load(cross_ptrs), input_precision=PRECISION)
    kept += (1.0 - damping) * tl.trans(_reloaded(small(small_ptr, matrix, _TO_RIGHT, RANK), lower))
    tl.store(cross_ptrs, kept)


@triton.jit(do_not_specialize=["every"])
def _right_problem_kernel(
    table_ptr, addresses_ptr, right_ptr, small_ptr, bad_ptr, found_inf, every,
    SKIP_NONFINITE: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Orthogonalize the rows of B: with B B^T = T T^T, R = T^-1 B and L = Y C^-T T. One program owns a matrix.

    It writes what makes L of Y and R of B.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    matrix = tl.program_id(0)
    at = matrix_at(table_ptr, addresses_ptr, matrix)
    if SKIP_NONFINITE:
        if tl.load(bad_ptr + field(at, OWNER)) != 0:
            return
    if _is_power_step(at, every) == 0:
        return
    n = field32(at, N)
    rank = field32(at, RANKS)
    gram = tl.zeros((RANK, RANK), tl.float32)
    for col in range(0, n, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        ptrs, mask = right_tile(right_ptr + field(at, RIGHT_SCRATCH), cols, n, rank, RANK)
        core = tl.load(ptrs, mask=mask, other=0.0)
        gram = tl.dot(core, tl.trans(core), gram, input_precision=PRECISION)
    to_left_ptrs = small(small_ptr, matrix, _TO_LEFT, RANK)
    lower, inverse = _triangular(_reloaded(to_left_ptrs, gram), rank, RANK)
    tl.store(small(small_ptr, matrix, _TO_RIGHT, RANK), inverse)
    lower = _reloaded(small(small_ptr, matrix, _FROM_RIGHT, RANK), lower)
    orthogonal = tl.load(small(small_ptr, matrix, _FROM_PRODUCT, RANK))
    tl.store(to_left_ptrs, tl.dot(tl.trans(orthogonal), lower, input_precision=PRECISION))


@triton.jit
def _exchange_left(
    at, rows, scratch_ptr, solve_ptrs, moves, PRECISION: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Rows of L."""
    m = field32(at, M)
    rank = field32(at, RANKS)
    state_ptrs, mask = left_tile(address_of(at, LEFT_STATE, tl.float32, False) + field(at, LEFT), rows, m, rank, RANK)
    scratch_ptrs, _ = left_tile(scratch_ptr + field(at, LEFT_SCRATCH), rows, m, rank, RANK)
    old = tl.load(state_ptrs, mask=mask, other=0.0)
    new = tl.load(scratch_ptrs, mask=mask, other=0.0)
    # all threads have read before one of them writes, in whatever layout
    tl.debug_barrier()
    if moves:
        new = tl.dot(new, tl.load(solve_ptrs), input_precision=PRECISION)
    tl.store(state_ptrs, new, mask=mask)
    tl.store(scratch_ptrs, old, mask=mask)


@triton.jit
def _exchange_right(
    at, cols, scratch_ptr, solve_ptrs, moves, PRECISION: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Columns of R. A row whose B depends on the others stays as it is, to be there when it is needed: L has zeros."""
    n = field32(at, N)
    rank = field32(at, RANKS)
    state_ptrs, mask = right_tile(
        address_of(at, RIGHT_STATE, tl.float32, False) + field(at, RIGHT), cols, n, rank, RANK
    )
    scratch_ptrs, _ = right_tile(scratch_ptr + field(at, RIGHT_SCRATCH), cols, n, rank, RANK)
    old = tl.load(state_ptrs, mask=mask, other=0.0)
    if moves:
        core = tl.load(scratch_ptrs, mask=mask, other=0.0)
        tl.debug_barrier()
        solve = tl.load(solve_ptrs)
        new = tl.dot(solve, core, input_precision=PRECISION)
        live = tl.sum(solve * solve, 1) > 0.0
        tl.store(state_ptrs, tl.where(live[:, None], new, old), mask=mask)
    tl.store(scratch_ptrs, old, mask=mask)


@triton.jit(do_not_specialize=["matrices", "row_blocks", "every"])
def _exchange_kernel(
    table_ptr, addresses_ptr, left_ptr, right_ptr, small_ptr, bad_ptr, found_inf, matrices, row_blocks, every,
    SKIP_NONFINITE: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """New factors into the state, old ones into the scratch.

    One program owns BLOCK_M rows of L or BLOCK_N columns of R.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    block = tl.program_id(0)
    is_left = block < row_blocks
    if is_left:
        matrix = find_matrix(table_ptr, matrices, block, ROW_BLOCK)
    else:
        matrix = find_matrix(table_ptr, matrices, block - row_blocks, COL_BLOCK)
    at = matrix_at(table_ptr, addresses_ptr, matrix)
    if SKIP_NONFINITE:
        if tl.load(bad_ptr + field(at, OWNER)) != 0:
            return
    moves = _is_power_step(at, every)
    if is_left:
        rows = (block - field(at, ROW_BLOCK)).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
        to_left_ptrs = small(small_ptr, matrix, _TO_LEFT, RANK)
        _exchange_left(at, rows, left_ptr, to_left_ptrs, moves, PRECISION, RANK, BLOCK_M)
    else:
        cols = (block - row_blocks - field(at, COL_BLOCK)).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
        to_right_ptrs = small(small_ptr, matrix, _TO_RIGHT, RANK)
        _exchange_right(at, cols, right_ptr, to_right_ptrs, moves, PRECISION, RANK, BLOCK_N)
