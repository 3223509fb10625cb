"""Launching the factored kernels: one launch for each tile and layout that occurs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..arguments import TRITON_DTYPES, compiler_options, device_scalar, update_arguments
from ..device import device_facts
from ..options import GradTransform, Rounding
from ..pieces import TOGETHER, RowPieces, advance_empty, pieces_of
from ..schedules import Shape, launch_schedule, phase_by_phase, remembered_schedules
from ..table import Layout, addresses, starts_aligned
from ..tickets import plan_order
from .fields import COLUMNS
from .kernels import _confidence_kernel, _factored_kernel
from .rule import FactoredRule
from .schedule import FactoredSchedule, schedules_of


@dataclass(frozen=True)
class FactoredPlan:
    """A tile's rows and columns, warps, and the registers that a thread may have (None: as many as it wants)."""

    tile: Shape
    num_warps: int
    maxnreg: int | None

    def options(self) -> dict[str, Any]:
        """Return the compiler's options."""
        return compiler_options(self.num_warps, self.maxnreg)


def plan_factored(tile: Shape, layout: Layout, warp_size: int) -> FactoredPlan:
    """Return the plan of one launch. The tile may not depend on it, since the order of sums depends on the tile.

    Aligned: 16 elements for each thread of 8 warps. Left to itself the compiler takes 150 to 230 registers on sm_90, so
    that a processor has one program; with 128 it has two, and what it saves in memory is nothing or a few numbers
    outside the loops. 16 warps would need as many registers, and twice the instructions for sums over rows. Otherwise
    see `schedule.tile_of`. AMD's compiler has no bound on registers.
    """
    return FactoredPlan(
        tile, num_warps=8 if layout.aligned else 16, maxnreg=128 if layout.aligned and warp_size == 32 else None
    )


def factored_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    rule: FactoredRule,
    exp_avgs: Sequence[Tensor] | None = None,
    param_sums: Sequence[Tensor] | None = None,
    pieces: RowPieces | None = None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.factored.factored_update_`: one launch for each tile and layout that occurs."""
    phases = ("look", "sums", "columns", "floor", "apply") if rule.eps_floor else ("look", "sums", "columns", "apply")
    columns = {
        "param": params, "grad": grads, "row": rows, "col": cols, "step": steps, "exp_avg": exp_avgs,
        "param_sum": param_sums if rule.scale_parameter else None,
    }  # fmt: skip
    _launch(
        _factored_kernel, phases, columns, pieces, transform, rounding,
        lr=device_scalar(lr), weight_decay=float(weight_decay),
        # 1 - beta is taken here, in double precision: 1 - 0.999f is off by 1e-5 of itself
        beta2_weight=None if rule.beta2 is None else 1 - rule.beta2, decay_rate=float(rule.decay_rate),
        eps1=float(rule.eps[0]), eps2=float(rule.eps[1]), clip_threshold=float(rule.clip_threshold),
        one_minus_beta1=1 - (rule.beta1 or 0.0),
        EPS_FLOOR=rule.eps_floor, SCHEDULE=rule.lr_schedule, SCALE_PARAMETER=rule.scale_parameter,
        SCALE_DECAY=rule.scale_decay, MOMENTUM=rule.beta1 is not None,
        CARRY=rule.scale_parameter and param_sums is not None,
    )  # fmt: skip


def confidence_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    res_rows: Sequence[Tensor | None],
    res_cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float, float],
    eps: tuple[float, float],
    clip_threshold: float,
    weight_decay: float,
    pieces: RowPieces | None = None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.factored.confidence_update_`: one launch for each tile and layout that occurs."""
    columns = {
        "param": params, "grad": grads, "row": rows, "col": cols, "step": steps, "exp_avg": exp_avgs,
        "res_row": res_rows, "res_col": res_cols,
    }  # fmt: skip
    _launch(
        _confidence_kernel,
        ("look", "sums", "columns", "residual", "residual_sums", "residual_columns", "apply"),
        columns, pieces, transform, rounding,
        lr=device_scalar(lr), weight_decay=float(weight_decay),
        one_minus_beta1=1 - betas[0], one_minus_beta2=1 - betas[1], one_minus_beta3=1 - betas[2],
        eps1=float(eps[0]), eps2=float(eps[1]), clip_threshold=float(clip_threshold),
    )  # fmt: skip


#: Phases after which sums of pieces are added up over processes.
_SUMS = ("sums", "residual_sums")


def _launch(
    kernel: Any,
    phases: tuple[str, ...],
    columns: dict[str, Any],
    pieces: RowPieces | None,
    transform: GradTransform,
    rounding: Rounding,
    **arguments: Any,
) -> None:
    """Launch over all parameters. ``phases`` are those of pieces, of which others do without _SUMS."""
    params, grads, exp_avgs = columns["param"], columns["grad"], columns["exp_avg"]
    if not params:
        return
    device = params[0].device
    facts = device_facts(device)
    where = addresses([columns.get(name) for name in COLUMNS])
    aligned = starts_aligned(where[:, _TILED])
    keys, itemsize = rounding.keys(len(params)), grads[0].itemsize

    def prepared(schedule: FactoredSchedule) -> Callable[..., None]:
        plan = plan_factored(schedule.tile, schedule.layout, facts.warp_size)
        return partial(
            launch_schedule, kernel, schedule, params, where,
            torch.empty(schedule.scratch, dtype=torch.float32, device=device),
            STATE=TRITON_DTYPES[exp_avgs[0].dtype] if exp_avgs else tl.float32,
            BLOCK_ROWS=plan.tile.rows, BLOCK_COLS=plan.tile.cols, **plan.options(),
            **update_arguments(params, grads, schedule.layout, transform, rounding), **arguments,
        )  # fmt: skip

    if pieces is None:
        phases = tuple([phase for phase in phases if phase not in _SUMS])
        for schedule in _schedules(params, grads, aligned, keys, phases, itemsize, plan_order(facts), None):
            prepared(schedule)(sums_ptr=None)
    else:
        residual = "residual" in phases

        def numbers(matrices: int, m: int) -> tuple[int, int]:
            """Of each matrix: columns of g² and g²/R, and of R; of the parameter: of p². Then the residual's."""
            return matrices * (2 * m + 1) + 1, matrices * (m + 1) if residual else 0

        places, sizes = pieces_of([p.shape for p in params], pieces, numbers)
        schedules = _schedules(params, grads, aligned, keys, phases, itemsize, TOGETHER, places)
        advance_empty(columns["step"], [place is None for place in places], transform.found_inf)
        _launch_phases([prepared(s) for s in schedules], schedules, phases, sizes, pieces, device)
    # the kernel wrote through addresses, which autograd cannot see: tell it that saved parameters are stale
    torch.autograd.graph.increment_version(params)


def _launch_phases(
    launches: Sequence[Callable[..., None]],
    schedules: Sequence[FactoredSchedule],
    phases: Sequence[str],
    sizes: tuple[int, int],
    pieces: RowPieces,
    device: torch.device,
) -> None:
    """Launch phase after phase of all schedules, and add up over processes what some of them leave."""
    launch_phase = phase_by_phase(schedules, launches, device)
    sums = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
    parts = iter(sums.split(sizes))
    for k, phase in enumerate(phases):
        launch_phase(k, sums)
        if phase in _SUMS:
            pieces.all_reduce(next(parts))


#: Columns that are read as tiles.
_TILED = [COLUMNS.index(name) for name in ("param", "grad", "row", "exp_avg")]


# for plain lists, of which nothing is remembered
_schedules_of = lru_cache(maxsize=64)(schedules_of)
_schedules = partial(remembered_schedules, _schedules_of)
