"""Triton kernels of the projection family. README.md of the family has the picture and the bytes.

The kernel of the update works through tickets: pieces of phases of parameters. Phase 0 reads the gradient and projects
it, phase 1 makes moments of the projection, and phase 2 reads the gradient again and writes the parameter. Of matrices
whose rows are in several processes, each phase is a launch, and what is in the sums is added up in between.
"""

import triton
import triton.language as tl

from ...field_fragments import column_address, field, scratch
from ...fragments import count_skipped, one_minus_power, scalar_or, stream_key
from ...line_fragments import KEY
from ...ticket_fragments import OWNER, PHASE, arrive, complete, find_segment, take_ticket, wait_for_earlier
from .apply import apply_tile
from .constants import (
    COLUMNS_SIZE,
    EPOCH_COLUMN,
    FIELDS_SIZE,
    G_COLUMN,
    OK,
    P_COLUMN,
    PROJECTION_COLUMN,
    SCALE_COLUMN,
    STEP_COLUMN,
)
from .draw import _projection_kernel, integer_or_load
from .moments import finish_channels, finish_moments, leave_sums, moments_tile
from .project import extents, finish_projection, is_usable, project_tile

__all__ = ["_apollo_finish_kernel", "_apollo_kernel", "_projection_kernel"]


@triton.jit
def found_at(at, sums_ptr, RIGHT: tl.constexpr, MODE: tl.constexpr, TENSOR: tl.constexpr):
    """As ``at``, for what belongs to channels: in the sums where these have rows in several processes."""
    if sums_ptr is None or RIGHT or (MODE == "none" and TENSOR):
        return at
    else:
        table_ptr, row_ptr, _ = at
        return table_ptr, row_ptr, sums_ptr


@triton.jit(do_not_specialize=["segments_start", "rows_start", "first_ticket", "owners", "counters", "epoch"])
def _apollo_kernel(
    table_ptr, addresses_ptr, scratch_ptr, counters_ptr, sums_ptr, skipped_ptr, found_inf,
    segments_start, rows_start, first_ticket, owners, counters, epoch,
    lr, weight_decay, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps, projected_scale, root_scale,
    growth_limit, scale, inv_scale, clip_value, clip_coef,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, PROJECTION: tl.constexpr, ALIGNED: tl.constexpr,
    STRIDED: tl.constexpr, CONTIGUOUS: tl.constexpr, RIGHT: tl.constexpr, LINES_BY_8: tl.constexpr,
    LENGTH_BY_8: tl.constexpr, RANK_BY_8: tl.constexpr, STOCHASTIC: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    READ: tl.constexpr, MOMENTS: tl.constexpr, WRITE: tl.constexpr, MODE: tl.constexpr, DRAWN: tl.constexpr,
    PLACES: tl.constexpr, TENSOR: tl.constexpr, LIMIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_LINES: tl.constexpr, BLOCK_PLACES: tl.constexpr, RANKS_AT_A_TIME: tl.constexpr,
    MOMENT_LINES: tl.constexpr, MOMENT_RANKS: tl.constexpr, APPLY_LINES: tl.constexpr, APPLY_PLACES: tl.constexpr,
):  # fmt: skip
    """APOLLO, or the phases of it for which READ, MOMENTS and WRITE stand. One program takes one ticket.

    Given ``sums_ptr``, parameters are pieces of matrices whose rows are in several processes.

    The last program of the first read says whether the parameter is to be updated; that of the moments writes the
    norms; that of the last read the step and the epoch.
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
    key = field(at, KEY)
    # of rank 1 both ways of laying out moments are one, and channels lie side by side
    RANKS_INSIDE: tl.constexpr = RIGHT and MODE != "one"
    # sums that belong to rows miss those of other processes
    PARTIAL: tl.constexpr = sums_ptr is not None and (RIGHT or MODE == "none")
    found = found_at(at, sums_ptr, RIGHT, MODE, TENSOR)
    step = 1.0
    if MOMENTS or WRITE:
        step = tl.load(column_address(address_ptr, STEP_COLUMN, tl.float32, False)) + 1.0

    wait_for_earlier(counters_ptr, segment_ptr)
    ok = 1.0
    if READ:
        if phase > 0:
            if sums_ptr is None:
                ok = tl.load(scratch(at, OK), cache_modifier=".cg")
            else:
                ok = is_usable(at, sums_ptr, SKIP_NONFINITE)
        else:
            project_tile(
                at, found, ticket, g_ptr, column_address(address_ptr, PROJECTION_COLUMN, PROJECTION, LENGTH_BY_8),
                integer_or_load(epoch), gradient,
                STRIDED, CONTIGUOUS, RANKS_INSIDE, LINES_BY_8, LENGTH_BY_8, RANK_BY_8, SKIP_NONFINITE, MODE, DRAWN,
                PLACES, OPERAND, PRECISION,
                BLOCK_LINES, BLOCK_PLACES, RANKS_AT_A_TIME,
            )  # fmt: skip
    if MOMENTS:
        if (phase == 1) & (ok == 1.0):
            moments_tile(
                at, found, ticket, address_ptr, g_ptr, (stream_key(key, step, 1), stream_key(key, step, 2)), gradient,
                (one_minus_beta1, one_minus_beta2), eps, projected_scale,
                STATE, ALIGNED, STRIDED, CONTIGUOUS, RANKS_INSIDE, LINES_BY_8, LENGTH_BY_8, RANK_BY_8, STOCHASTIC,
                SKIP_NONFINITE, MODE, TENSOR, RIGHT, PARTIAL, MOMENT_LINES, MOMENT_RANKS,
            )  # fmt: skip
    if WRITE:
        if (phase == 2) & (ok == 1.0):
            rate = scalar_or(lr, 0.0)
            apply_tile(
                at, ticket, column_address(address_ptr, P_COLUMN, PARAM, ALIGNED), g_ptr,
                column_address(address_ptr, SCALE_COLUMN, tl.float32, False), stream_key(key, step, 0), gradient,
                rate, rate * weight_decay, skipped_ptr,
                PARAM, STRIDED, CONTIGUOUS, RIGHT, LINES_BY_8, LENGTH_BY_8, STOCHASTIC, SKIP_NONFINITE, TENSOR,
                not READ, sums_ptr is not None, APPLY_LINES, APPLY_PLACES,
            )  # fmt: skip

    if arrive(counters_ptr, segment_ptr):
        if READ:
            if phase == 0:
                finish_projection(at, sums_ptr, SKIP_NONFINITE)
        if MOMENTS:
            if (phase == 1) & (ok == 1.0):
                if not PARTIAL:
                    root = tl.sqrt(one_minus_power(log_beta2, step))
                    correction = root / one_minus_power(log_beta1, step)
                    finish_moments(at, address_ptr, None, root_scale, correction, growth_limit, TENSOR, LIMIT)
                elif RIGHT or TENSOR:
                    leave_sums(at, sums_ptr, TENSOR)
        if WRITE:
            if phase == 2:
                if ok == 1.0:
                    tl.store(column_address(address_ptr, STEP_COLUMN, tl.float32, False), step)
                    if READ:
                        now = integer_or_load(epoch).to(tl.float32)
                        tl.store(column_address(address_ptr, EPOCH_COLUMN, tl.float32, False), now)
                else:
                    count_skipped(skipped_ptr, tl.full((), 1, tl.int32))
        complete(counters_ptr, segment_ptr, owners, counters)


@triton.jit(do_not_specialize=["rows_start"])
def _apollo_finish_kernel(
    table_ptr, addresses_ptr, scratch_ptr, sums_ptr, found_inf, rows_start,
    log_beta1, log_beta2, root_scale, growth_limit,
    RIGHT: tl.constexpr, LINES_BY_8: tl.constexpr, LENGTH_BY_8: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    TENSOR: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """What follows the moments of pieces whose sums are now those of all processes. One program takes one parameter.

    Writes the matrices' norms and factors; and the channels' scales where their rows are in several processes.
    """
    if scalar_or(found_inf, 0.0) != 0.0:
        return
    k = tl.program_id(0).to(tl.int64)
    at = (table_ptr, table_ptr + rows_start + k * FIELDS_SIZE, scratch_ptr)
    address_ptr = addresses_ptr + k * COLUMNS_SIZE
    if is_usable(at, sums_ptr, SKIP_NONFINITE) == 1.0:
        if not RIGHT and not TENSOR:
            count, _length = extents(at, LINES_BY_8, LENGTH_BY_8)
            finish_channels(at, found_at(at, sums_ptr, RIGHT, "none", TENSOR), count)
        step = tl.load(column_address(address_ptr, STEP_COLUMN, tl.float32, False)) + 1.0
        correction = tl.sqrt(one_minus_power(log_beta2, step)) / one_minus_power(log_beta1, step)
        finish_moments(at, address_ptr, sums_ptr, root_scale, correction, growth_limit, TENSOR, LIMIT)
