"""The reads before the last one, and what closes them: sums over lines become scales."""

import triton
import triton.language as tl

from ...field_fragments import by_fours, field, field32, scratch, sum_groups, sum_of
from ...fragments import is_finite
from ...line_fragments import GROUPS, LENGTH, LINES, extents, lines_of, matrices_of, matrix, offsets
from .constants import (
    CLOSING_TICKETS,
    CROSS_SCALE,
    CROSS_SUMS,
    FACTOR,
    GROUP_SUM,
    LINE_NORM,
    LINE_SCALE,
    OK,
    PARTIAL,
    PROBE,
    SINGLE_SUMS,
    SLAB,
    SLAB_TICKETS,
    SLAB_WIDTH,
    THRESHOLD,
    WHOLE_LINES,
)
from .tile import cross_scales, line_scales, load_x, scale_of


@triton.jit
def sweep_tile(
    at, ticket, sweep, sweeps, pointers, gradient, momentum, eps,
    ALIGNED: tl.constexpr, STRIDED: tl.constexpr, CONTIGUOUS: tl.constexpr, ROWS: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr, SIGN: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_THRESHOLD: tl.constexpr, TOTAL: tl.constexpr, TOTAL_LINE: tl.constexpr,
    FIRST_LINE: tl.constexpr, FIRST_CROSS: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_LINES: tl.constexpr, BLOCK_PLACES: tl.constexpr,
):  # fmt: skip
    """One read of a group of lines. Writes the lines' scales, and of the group the sums over lines, or a single sum.

    RESIDENT: a tile has whole lines, which stay in registers while they are scaled. Otherwise they are read twice, the
    second time from a cache, and sums over lines are added up in memory.
    """
    g_ptr, m_ptr = pointers
    extent = extents(at, ALIGNED, CONTIGUOUS)
    count, length = extent
    size = count.to(tl.int64) * length
    is_norms = False
    if HAS_THRESHOLD:
        is_norms = sweep == 0
    is_total = False
    if TOTAL:
        is_total = sweep == sweeps - 1
    has_line = sweep >= FIRST_LINE
    if TOTAL and not TOTAL_LINE:
        has_line = has_line & (sweep < sweeps - 1)
    first, end = matrices_of(at, ticket, field32(at, GROUPS))
    group, first_line, end_line = lines_of(at, ticket, count, ALIGNED, CONTIGUOUS)
    for i in range(first, end):
        e = tl.full((), 0, tl.int32) + i  # a loop counter is a Python number in the interpreter
        e_ptr = matrix(at, g_ptr, e, size, 1, STRIDED)
        e_m_ptr = matrix(at, m_ptr, e, size, 2, STRIDED)
        e_group = e.to(tl.int64) * field(at, GROUPS) + group
        partial_ptr = scratch(at, PARTIAL) + e_group * length
        places = tl.arange(0, BLOCK_PLACES)
        if RESIDENT:
            t = cross_scales(at, e, places, places < length, sweep > FIRST_CROSS)
            sums = tl.zeros((BLOCK_PLACES,), tl.float32)
        single = 0.0
        for line in range(first_line, end_line, BLOCK_LINES):
            lines = line + tl.arange(0, BLOCK_LINES)
            inside = lines < end_line
            if RESIDENT:
                mask = inside[:, None] & (places < length)[None, :]
                g_ptrs = e_ptr + offsets(at, lines, places, extent, 1, STRIDED, CONTIGUOUS)
                m_ptrs = e_m_ptr + offsets(at, lines, places, extent, 2, STRIDED, ROWS)
                x, _moved = load_x(g_ptrs, m_ptrs, mask, gradient, momentum, SKIP_NONFINITE, SIGN, MOMENTUM, NESTEROV)
                y = x * t[None, :]
                squares = tl.sum(y * y, 1)
            else:
                by_line = tl.zeros((BLOCK_LINES, BLOCK_PLACES // 4), tl.float32)
                for place in range(0, length, BLOCK_PLACES):
                    here = place + places
                    mask = inside[:, None] & (here < length)[None, :]
                    g_ptrs = e_ptr + offsets(at, lines, here, extent, 1, STRIDED, CONTIGUOUS)
                    m_ptrs = e_m_ptr + offsets(at, lines, here, extent, 2, STRIDED, ROWS)
                    x, _moved = load_x(
                        g_ptrs, m_ptrs, mask, gradient, momentum, SKIP_NONFINITE, SIGN, MOMENTUM, NESTEROV
                    )
                    y = x * cross_scales(at, e, here, here < length, sweep > FIRST_CROSS)[None, :]
                    by_line += by_fours(y * y)
                squares = tl.sum(by_line, 1)
            line_place = e.to(tl.int64) * count + lines
            if is_norms:
                norms = tl.sqrt(squares)
                tl.store(scratch(at, LINE_NORM) + line_place, norms, mask=inside)
                single += tl.sum(tl.where(inside, norms, 0.0))
            else:
                s = line_scales(at, e, lines, inside, squares, has_line, sweep > FIRST_LINE, eps, CLAMP, HAS_THRESHOLD)
                if CLAMP:
                    # each warp has read the old scales, which a faster one must not overwrite before
                    tl.debug_barrier()
                tl.store(scratch(at, LINE_SCALE) + line_place, s, mask=inside)
                if is_total:
                    single += tl.sum(tl.where(inside, s * s * squares, 0.0))
                else:
                    if RESIDENT:
                        z = x * s[:, None]
                        sums += tl.sum(z * z, 0)
                    else:
                        for place in range(0, length, BLOCK_PLACES):
                            here = place + places
                            mask = inside[:, None] & (here < length)[None, :]
                            g_ptrs = e_ptr + offsets(at, lines, here, extent, 1, STRIDED, CONTIGUOUS)
                            m_ptrs = e_m_ptr + offsets(at, lines, here, extent, 2, STRIDED, ROWS)
                            x, _moved = load_x(
                                g_ptrs, m_ptrs, mask, gradient, momentum, SKIP_NONFINITE, SIGN, MOMENTUM, NESTEROV
                            )
                            z = x * s[:, None]
                            before = (here < length) & (line > first_line)
                            earlier = tl.load(partial_ptr + here, mask=before, other=0.0, cache_modifier=".cg")
                            tl.store(partial_ptr + here, earlier + tl.sum(z * z, 0), mask=here < length)
                        # another thread may read these sums for the next lines
                        tl.debug_barrier()
        if is_norms | is_total:
            tl.store(scratch(at, GROUP_SUM) + e_group, single)
        else:
            if RESIDENT:
                tl.store(partial_ptr + places, sums, mask=places < length)


@triton.jit
def closing_tile(
    at, ticket, sweep, sweeps, sums_ptr, eps, row_threshold,
    CLAMP: tl.constexpr, HAS_THRESHOLD: tl.constexpr, TOTAL: tl.constexpr, FIRST_CROSS: tl.constexpr,
):  # fmt: skip
    """What follows a read. Writes the scales of a slab of places, or the threshold or the factor of some matrices.

    Sums are those of all groups, or of all processes where there is sums_ptr.
    """
    count = field32(at, WHOLE_LINES)
    length = field32(at, LENGTH)
    groups = field32(at, GROUPS)
    is_norms = False
    if HAS_THRESHOLD:
        is_norms = sweep == 0
    is_total = False
    if TOTAL:
        is_total = sweep == sweeps - 1
    probe = 0.0
    if is_norms | is_total:
        first, end = matrices_of(at, ticket, 1)
        for i in range(first, end):
            e = (tl.full((), 0, tl.int32) + i).to(tl.int64)
            if sums_ptr is None:
                total = sum_of(scratch(at, GROUP_SUM) + e * groups, groups)
            else:
                total = tl.load(sums_ptr + field(at, SINGLE_SUMS) + e)
            if is_norms:
                tl.store(scratch(at, THRESHOLD) + e, row_threshold * total / count)
            else:
                elements = count.to(tl.float32) * length.to(tl.float32)
                tl.store(scratch(at, FACTOR) + e, scale_of(total, elements, 1.0, eps, False))
            probe += 0.0 * total
    else:
        first, end = matrices_of(at, ticket, field32(at, SLAB_TICKETS))
        first_place = (ticket % field32(at, SLAB_TICKETS)) * field32(at, SLAB_WIDTH)
        end_place = tl.minimum(first_place + field32(at, SLAB_WIDTH), length)
        for i in range(first, end):
            e = (tl.full((), 0, tl.int32) + i).to(tl.int64)
            for place in range(first_place, end_place, SLAB):
                places = place + tl.arange(0, SLAB)
                inside = places < length
                if sums_ptr is None:
                    partial_ptr = scratch(at, PARTIAL) + e * groups * length
                    squares, _none = sum_groups(partial_ptr, groups, length, places, length, SLAB, False)
                else:
                    to_ptr = sums_ptr + field(at, CROSS_SUMS) + e * length
                    squares = tl.load(to_ptr + places, mask=inside, other=0.0)
                old = 1.0
                if CLAMP:
                    old = cross_scales(at, e, places, inside, sweep > FIRST_CROSS)
                t = scale_of(squares, count.to(tl.float32), old, eps, CLAMP)
                tl.store(scratch(at, CROSS_SCALE) + e * length + places, t, mask=inside)
                probe += tl.sum(0.0 * squares)
    tl.store(scratch(at, PROBE) + ticket, probe)


@triton.jit
def sums_tile(at, ticket, sums_ptr, CROSS: tl.constexpr):
    """What a piece has to add to the sums of a read. Writes those of a slab of places where CROSS, else single ones."""
    length = field32(at, LENGTH)
    groups = field32(at, GROUPS)
    # a piece without lines has left no sums
    filled = tl.where(field(at, LINES) > 0, groups, 0)
    tickets = field32(at, SLAB_TICKETS) if CROSS else 1
    first, end = matrices_of(at, ticket, tickets)
    first_place = (ticket % tickets) * field32(at, SLAB_WIDTH)
    end_place = tl.minimum(first_place + field32(at, SLAB_WIDTH), length)
    for i in range(first, end):
        e = (tl.full((), 0, tl.int32) + i).to(tl.int64)
        if CROSS:
            for place in range(first_place, end_place, SLAB):
                places = place + tl.arange(0, SLAB)
                partial_ptr = scratch(at, PARTIAL) + e * groups * length
                squares, _none = sum_groups(partial_ptr, filled, length, places, length, SLAB, False)
                to_ptr = sums_ptr + field(at, CROSS_SUMS) + e * length
                tl.store(to_ptr + places, squares, mask=places < length)
        else:
            total = sum_of(scratch(at, GROUP_SUM) + e * groups, filled)
            tl.store(sums_ptr + field(at, SINGLE_SUMS) + e, total)


@triton.jit
def finish(at, SKIP_NONFINITE: tl.constexpr):
    """What the last ticket of the last closing phase does: say whether the parameter is to be updated."""
    if SKIP_NONFINITE:
        probe = sum_of(scratch(at, PROBE), field32(at, CLOSING_TICKETS))
        tl.store(scratch(at, OK), tl.where(is_finite(probe), 1.0, 0.0))
    else:
        tl.store(scratch(at, OK), 1.0)
