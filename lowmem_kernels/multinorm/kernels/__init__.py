"""Triton kernel of the multi-normalization family. README.md of the family has the picture and the bytes.

It works through tickets: pieces of phases of parameters. Phase 2 k is read k of the gradient, phase 2 k + 1 closes it,
and phase 2 K is the last read, which writes.
"""

import triton
import triton.language as tl

from ...field_fragments import column_address, field, scratch
from ...fragments import count_skipped, scalar_or, stream_key
from ...line_fragments import KEY
from ...ticket_fragments import OWNER, PHASE, arrive, complete, find_segment, take_ticket, wait_for_earlier
from .apply import apply_tile
from .constants import (
    COL_OFFSET_COLUMN,
    COL_SCALE_COLUMN,
    COLUMNS_SIZE,
    EXP_AVG_COLUMN,
    FIELDS_SIZE,
    G_COLUMN,
    OK,
    P_COLUMN,
    ROW_OFFSET_COLUMN,
    ROW_SCALE_COLUMN,
    STEP_COLUMN,
)
from .sweep import closing_tile, finish, sums_tile, sweep_tile
from .whole import whole_tile

__all__ = ["_multinorm_kernel", "_multinorm_sums_kernel"]


@triton.jit(do_not_specialize=["segments_start", "rows_start", "first_ticket", "owners", "counters", "sweeps", "pairs"])
def _multinorm_kernel(
    table_ptr, addresses_ptr, scratch_ptr, counters_ptr, sums_ptr, skipped_ptr, found_inf,
    segments_start, rows_start, first_ticket, owners, counters, sweeps, pairs,
    lr, update_scale, weight_decay, momentum, one_minus_momentum, eps, row_threshold,
    scale, inv_scale, clip_value, clip_coef,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr,
    CONTIGUOUS: tl.constexpr, ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    SIGN: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, CLAMP: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr, TOTAL: tl.constexpr, TOTAL_LINE: tl.constexpr, FIRST_LINE: tl.constexpr,
    FIRST_CROSS: tl.constexpr, LAST_LINE: tl.constexpr, SWEEPS: tl.constexpr, WHOLE: tl.constexpr, GIVEN: tl.constexpr,
    OFFSETS: tl.constexpr, KEEP: tl.constexpr, WRITE: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_LINES: tl.constexpr, BLOCK_PLACES: tl.constexpr, APPLY_LINES: tl.constexpr, APPLY_PLACES: tl.constexpr,
):  # fmt: skip
    """Multi-normalization. One program takes one ticket and writes what the tile function of its phase says.

    The last program of the last closing phase says whether the parameter is to be updated; that of the last read
    writes the step.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    segment_ptr, ticket = find_segment(table_ptr, segments_start, take_ticket(counters_ptr, first_ticket))
    k = tl.load(segment_ptr + OWNER)
    phase = tl.load(segment_ptr + PHASE).to(tl.int32)
    at = (table_ptr, table_ptr + rows_start + k * FIELDS_SIZE, scratch_ptr)
    address_ptr = addresses_ptr + k * COLUMNS_SIZE
    gradient = (scale * scalar_or(inv_scale, 1.0), clip_value, scalar_or(clip_coef, 1.0))
    g_ptr = column_address(address_ptr, G_COLUMN, GRAD, ALIGNED)
    m_ptr = column_address(address_ptr, EXP_AVG_COLUMN, STATE, ALIGNED)

    wait_for_earlier(counters_ptr, segment_ptr)
    # without SWEEPS there is only the last read, of WHOLE matrices or of lines, and nothing else is compiled
    if SWEEPS and phase < 2 * sweeps:
        if phase % 2 == 0:
            sweep_tile(
                at, ticket, phase // 2, sweeps, (g_ptr, m_ptr), gradient, momentum, eps,
                ALIGNED, STRIDED, CONTIGUOUS, ROWS, SKIP_NONFINITE, SIGN, MOMENTUM, NESTEROV, CLAMP, HAS_THRESHOLD,
                TOTAL, TOTAL_LINE, FIRST_LINE, FIRST_CROSS, RESIDENT, BLOCK_LINES, BLOCK_PLACES,
            )  # fmt: skip
        else:
            closing_tile(
                at, ticket, phase // 2, sweeps, sums_ptr, eps, row_threshold,
                CLAMP, HAS_THRESHOLD, TOTAL, FIRST_CROSS,
            )  # fmt: skip
    else:
        ok = 1.0
        if SWEEPS and WRITE:
            ok = tl.load(scratch(at, OK), cache_modifier=".cg")
        if ok == 1.0:
            LINE_SCALE_COLUMN: tl.constexpr = ROW_SCALE_COLUMN if ROWS else COL_SCALE_COLUMN
            CROSS_SCALE_COLUMN: tl.constexpr = COL_SCALE_COLUMN if ROWS else ROW_SCALE_COLUMN
            LINE_OFFSET_COLUMN: tl.constexpr = ROW_OFFSET_COLUMN if ROWS else COL_OFFSET_COLUMN
            CROSS_OFFSET_COLUMN: tl.constexpr = COL_OFFSET_COLUMN if ROWS else ROW_OFFSET_COLUMN
            pointers = (
                column_address(address_ptr, P_COLUMN, PARAM, ALIGNED),
                g_ptr,
                m_ptr,
                column_address(address_ptr, LINE_SCALE_COLUMN, tl.float32, False),
                column_address(address_ptr, CROSS_SCALE_COLUMN, tl.float32, False),
                column_address(address_ptr, LINE_OFFSET_COLUMN, tl.float32, False),
                column_address(address_ptr, CROSS_OFFSET_COLUMN, tl.float32, False),
            )
            step = 1.0
            if WRITE:
                step = tl.load(column_address(address_ptr, STEP_COLUMN, tl.float32, False)) + 1.0
            key = field(at, KEY)
            keys = (stream_key(key, step, 0), stream_key(key, step, 1))
            rates = (scalar_or(lr, 0.0) * update_scale, scalar_or(lr, 0.0) * weight_decay)
            if WHOLE:
                whole_tile(
                    at, pairs, (pointers[0], g_ptr, m_ptr), keys, gradient, rates, momentum, one_minus_momentum, eps,
                    row_threshold,
                    PARAM, STATE, ALIGNED, STRIDED, CONTIGUOUS, ROWS, STOCHASTIC, SKIP_NONFINITE, SIGN, MOMENTUM,
                    NESTEROV, CLAMP, HAS_THRESHOLD, TOTAL, TOTAL_LINE, FIRST_LINE > FIRST_CROSS, LAST_LINE,
                    BLOCK_LINES, BLOCK_PLACES,
                )  # fmt: skip
            else:
                apply_tile(
                    at, ticket, sweeps, pointers, keys, gradient, rates, momentum, one_minus_momentum, eps, skipped_ptr,
                    sums_ptr is not None, PARAM, STATE, ALIGNED, STRIDED, CONTIGUOUS, ROWS, STOCHASTIC, SKIP_NONFINITE,
                    SIGN, MOMENTUM, NESTEROV, CLAMP, HAS_THRESHOLD, TOTAL, FIRST_LINE, FIRST_CROSS, LAST_LINE, GIVEN,
                    OFFSETS, KEEP, WRITE, RESIDENT, APPLY_LINES, APPLY_PLACES,
                )  # fmt: skip

    if arrive(counters_ptr, segment_ptr):
        if SWEEPS and phase == 2 * sweeps - 1:
            finish(at, SKIP_NONFINITE and not KEEP)
        if WRITE and phase == 2 * sweeps:
            step_ptr = column_address(address_ptr, STEP_COLUMN, tl.float32, False)
            ok = 1.0
            if SWEEPS or WHOLE:
                ok = tl.load(scratch(at, OK), cache_modifier=".cg")
            if ok == 1.0:
                tl.store(step_ptr, tl.load(step_ptr) + 1.0)
            else:
                count_skipped(skipped_ptr, tl.full((), 1, tl.int32))
        complete(counters_ptr, segment_ptr, owners, counters)


@triton.jit(do_not_specialize=["segments_start", "rows_start", "first_ticket"])
def _multinorm_sums_kernel(
    table_ptr, scratch_ptr, sums_ptr, found_inf, segments_start, rows_start, first_ticket, CROSS: tl.constexpr
):  # fmt: skip
    """One program takes one ticket of a closing phase of pieces and writes what is to be added up over processes."""
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    segment_ptr, ticket = find_segment(table_ptr, segments_start, first_ticket + tl.program_id(0))
    k = tl.load(segment_ptr + OWNER)
    sums_tile((table_ptr, table_ptr + rows_start + k * FIELDS_SIZE, scratch_ptr), ticket, sums_ptr, CROSS)
