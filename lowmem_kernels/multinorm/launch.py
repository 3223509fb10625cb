"""Launching the multi-normalization kernel: one launch for each route that occurs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..arguments import TRITON_DTYPES, compiler_options, device_scalar, update_arguments
from ..device import device_facts, launching_on
from ..options import GradTransform, Rounding
from ..pieces import TOGETHER, RowPieces, advance_empty, pieces_of
from ..schedules import cut_out, fields_of, launch_schedule, phase_by_phase, remembered_schedules
from ..table import addresses, starts_aligned, uploaded
from ..tickets import plan_order
from .checks import vector_shapes
from .fields import COLUMNS, FIELDS
from .kernels import _multinorm_kernel, _multinorm_sums_kernel
from .rule import NormRule, Sweep, keeps_elements, steps_of, sweeps_of
from .schedule import MultinormSchedule, Route, schedules_of


@dataclass(frozen=True)
class MultinormPlan:
    """Warps, and the registers that a thread may have (None: as many as it wants)."""

    num_warps: int
    maxnreg: int | None

    def options(self) -> dict[str, Any]:
        """Return the compiler's options."""
        return compiler_options(self.num_warps, self.maxnreg)


def plan_multinorm(route: Route, warp_size: int) -> MultinormPlan:
    """Return the plan of one launch. Sums depend on tiles, which are the route's.

    Aligned: 32 elements for each thread, of 8 warps, or of 16 for lines that only these can hold; with at most 128
    registers a processor has two programs of 8 warps, so that one reads while the other adds. Otherwise 16 warps with
    4 elements each. AMD's compiler has no bound on registers.
    """
    wide = route.tile.rows * route.tile.cols > 8192
    return MultinormPlan(
        num_warps=16 if wide or not route.layout.aligned else 8,
        maxnreg=128 if route.layout.aligned and warp_size == 32 else None,
    )


def sinkhorn_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    rule: NormRule,
    exp_avgs: Sequence[Tensor] | None = None,
    pieces: RowPieces | None = None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.multinorm.sinkhorn_update_`: one launch for each route that occurs."""
    columns = {"param": params, "grad": grads, "step": steps, "exp_avg": exp_avgs}
    _launch(
        columns, rule, transform, rounding, pieces,
        lr=device_scalar(lr), update_scale=float(rule.scale), weight_decay=float(weight_decay),
        GIVEN=False, OFFSETS=False, KEEP=keeps_elements(rule), WRITE=True,
    )  # fmt: skip
    # the kernel wrote through addresses, which autograd cannot see: tell it that saved parameters are stale
    torch.autograd.graph.increment_version(params)


def sinkhorn_scales(
    grads: Sequence[Tensor], *, rule: NormRule, transform: GradTransform
) -> tuple[list[Tensor], list[Tensor]]:
    """As `lowmem_kernels.multinorm.sinkhorn_scales`: one launch for each route that occurs."""
    rule = NormRule(rule.norms, eps=rule.eps, row_threshold=rule.row_threshold, conv=rule.conv)
    transform = GradTransform(transform.inv_scale, transform.clip_value, transform.clip_coef, transform.maximize)
    lists: tuple[list[Tensor], list[Tensor]] = ([], [])
    for found in lists:
        found.extend(torch.empty(0) for _ in grads)
    launched = _launch(
        {"param": grads, "grad": grads, "exp_avg": None}, rule, transform, Rounding(),
        lr=0.0, update_scale=0.0, weight_decay=0.0, GIVEN=False, OFFSETS=False, KEEP=False, WRITE=False,
    )  # fmt: skip
    for schedule, scratch in launched:
        sweeps, _ = sweeps_of(rule, "row" if schedule.route.rows else "col")
        crossed = any(sweep.sums == "cross" for sweep in sweeps)
        for i, fields in fields_of(schedule, FIELDS):
            shapes = vector_shapes(grads[i], rule.conv)
            line_shape, cross_shape = shapes if schedule.route.rows else shapes[::-1]
            lines, cross = lists if schedule.route.rows else lists[::-1]
            lines[i] = cut_out(scratch, fields["line_scale"], line_shape)
            cross[i] = cut_out(scratch, fields["cross_scale"], cross_shape)
            if not crossed:
                cross[i].fill_(1.0)
    return lists


def rank1_apply_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    col_scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    row_offsets: Sequence[Tensor] | None = None,
    col_offsets: Sequence[Tensor] | None = None,
    sign: bool = False,
    conv: bool = False,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.multinorm.rank1_apply_`: one launch for each route that occurs."""
    columns = {
        "param": params, "grad": grads, "step": steps, "exp_avg": None, "row_scale": row_scales,
        "col_scale": col_scales, "row_offset": row_offsets, "col_offset": col_offsets,
    }  # fmt: skip
    # a sign alone needs no sums, so that there is only the last read
    _launch(
        columns, NormRule(("sign",), conv=conv), transform, rounding,
        lr=device_scalar(lr), update_scale=1.0, weight_decay=float(weight_decay),
        GIVEN=True, OFFSETS=row_offsets is not None, KEEP=True, WRITE=True, SIGN=sign,
    )  # fmt: skip
    torch.autograd.graph.increment_version(params)


def _launch(
    columns: dict[str, Any],
    rule: NormRule,
    transform: GradTransform,
    rounding: Rounding,
    pieces: RowPieces | None = None,
    **arguments: Any,
) -> list[tuple[MultinormSchedule, Tensor]]:
    """Launch over all parameters; return each schedule with its scratch."""
    params, grads, exp_avgs = columns["param"], columns["grad"], columns["exp_avg"]
    launched: list[tuple[MultinormSchedule, Tensor]] = []
    if not params:
        return launched
    device = params[0].device
    facts = device_facts(device)
    where = addresses([columns.get(name) for name in COLUMNS])
    aligned = starts_aligned(where[:, _TILED])
    momentum = "none" if exp_avgs is None else "after" if rule.momentum_after else "before"
    keys, writes, itemsize = rounding.keys(len(params)), arguments["WRITE"], grads[0].itemsize

    def prepared(schedule: MultinormSchedule, scratch: Tensor) -> Callable[..., None]:
        route = schedule.route
        return partial(
            launch_schedule, _multinorm_kernel, schedule, params, where, scratch,
            momentum=float(rule.momentum), one_minus_momentum=1 - rule.momentum, eps=float(rule.eps or 0.0),
            row_threshold=float(rule.row_threshold), STATE=TRITON_DTYPES[exp_avgs[0].dtype] if exp_avgs else tl.float32,
            MOMENTUM=momentum, NESTEROV=rule.nesterov, **plan_multinorm(route, facts.warp_size).options(),
            **{**rule_arguments(rule, route), **update_arguments(params, grads, route.layout, transform, rounding),
               **arguments},
        )  # fmt: skip

    if pieces is None:
        for schedule in _schedules(params, grads, aligned, keys, rule, writes, itemsize, plan_order(facts), None):
            scratch = torch.empty(schedule.scratch, dtype=torch.float32, device=device)
            prepared(schedule, scratch)(sums_ptr=None)
            launched.append((schedule, scratch))
        return launched
    # sums of columns, and of matrices; a read leaves one of them
    places, sizes = pieces_of([p.shape for p in params], pieces, lambda matrices, m: (matrices * m, matrices))
    advance_empty(columns["step"], [place is None for place in places], transform.found_inf)
    for schedule in _schedules(params, grads, aligned, keys, rule, writes, itemsize, TOGETHER, places):
        launched.append((schedule, torch.empty(schedule.scratch, dtype=torch.float32, device=device)))
    launches = [prepared(*each) for each in launched]
    _launch_phases(launched, launches, params, rule, sizes, pieces, transform.found_inf)
    return launched


def _launch_phases(
    launched: Sequence[tuple[MultinormSchedule, Tensor]],
    launches: Sequence[Callable[..., None]],
    params: Sequence[Tensor],
    rule: NormRule,
    sizes: tuple[int, int],
    pieces: RowPieces,
    found_inf: Tensor | None,
) -> None:
    """Launch phase after phase of all schedules; after each read, add up over processes what it has left."""
    device = params[0].device
    launch_phase = phase_by_phase([schedule for schedule, _ in launched], launches, device)
    sweeps, _ = sweeps_of(rule, "row")
    # the last read takes sums_ptr for a sign that these are pieces
    sums = torch.empty(1, dtype=torch.float32, device=device)
    for k, sweep in enumerate(sweeps):
        launch_phase(2 * k, sums)
        sums = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        of_columns, of_matrices = sums.split(sizes)
        for schedule, scratch in launched:
            tickets = schedule.launches[2 * k + 1]
            with launching_on(device):
                _multinorm_sums_kernel[(len(tickets),)](
                    table_ptr=uploaded(params, schedule, schedule.values), scratch_ptr=scratch, sums_ptr=sums,
                    found_inf=found_inf, segments_start=schedule.segments_start, rows_start=schedule.rows_start,
                    first_ticket=tickets.start, CROSS=sweep.sums == "cross", num_warps=4, enable_fp_fusion=False,
                )  # fmt: skip
        pieces.all_reduce(of_columns if sweep.sums == "cross" else of_matrices)
        launch_phase(2 * k + 1, sums)
    launch_phase(2 * len(sweeps), sums)


def rule_arguments(rule: NormRule, route: Route) -> dict[str, Any]:
    """Return the kernel's arguments that follow from the norms and from how a parameter is looked at."""
    sweeps, last_line = sweeps_of(rule, "row" if route.rows else "col")
    crossing = 1 if rule.row_threshold else 0
    first_plain = any(sweep.sums == "cross" and not sweep.line for sweep in sweeps[crossing : crossing + 1])
    total = bool(sweeps) and sweeps[-1].sums == "total"
    return {
        "sweeps": 0 if route.whole else len(sweeps),
        "pairs": sum(sweep == Sweep(True, "cross") for sweep in sweeps),
        "SIGN": steps_of(rule.norms).sign,
        "CLAMP": rule.eps is not None,
        "HAS_THRESHOLD": bool(rule.row_threshold),
        "TOTAL": total,
        "TOTAL_LINE": total and sweeps[-1].line,
        "FIRST_LINE": crossing + first_plain,
        "FIRST_CROSS": crossing,
        "LAST_LINE": last_line,
        "SWEEPS": bool(sweeps) and not route.whole,
        "WHOLE": route.whole,
        "CONTIGUOUS": route.contiguous,
        "ROWS": route.rows,
        "RESIDENT": route.resident,
        "BLOCK_LINES": route.tile.rows,
        "BLOCK_PLACES": route.tile.cols,
        "APPLY_LINES": route.apply_tile.rows,
        "APPLY_PLACES": route.apply_tile.cols,
    }


#: Columns that are read as tiles.
_TILED = [COLUMNS.index(name) for name in ("param", "grad", "exp_avg")]


# for plain lists, of which nothing is remembered
_schedules_of = lru_cache(maxsize=64)(schedules_of)
_schedules = partial(remembered_schedules, _schedules_of)
