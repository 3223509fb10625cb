"""Launching the kernels of partial momentum: plans, and up to eight launches for each kind of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..arguments import device_scalar, log_of, taken_by, update_arguments
from ..device import device_facts, launching_on
from ..options import GradTransform, Rounding
from ..schedules import geometries_of, vectors
from ..table import addresses, counters, starts_aligned, strides_of, uploaded
from ..tensors import remembered
from . import kernels
from .checks import Form, form_of
from .rule import MomentumRule
from .schedule import LEAST_RANK, Kind, Schedule, moments_of, schedules_of, tiling_of

#: Rows (columns) of a factor that a small problem takes at a time, and sums of squares of a side at a time.
PROBLEM_BLOCK, MOMENT_BLOCK = 32, 256

#: Warps of a program that has a small problem: more would hold the same numbers several times.
PROBLEM_WARPS = 4


@dataclass(frozen=True)
class MomentumPlan:
    """Tiles of a pass over the gradient, columns of a program of the update, warps, stages, precision of tl.dot."""

    block_m: int
    block_n: int
    span: int
    num_warps: int
    num_stages: int
    precision: str


def plan_momentum(kind: Kind, warp_size: int) -> MomentumPlan:
    """Return the plan of the passes over gradients of a kind.

    Three TF32 products stand for one of fp32 ("tf32x3"): the residual is a difference that is multiplied by
    1 / (1 - b1). AMD's compiler takes "ieee" only.
    """
    rows, cols, span = tiling_of(kind)
    warps = 8 if kind.rank else 4
    return MomentumPlan(rows, cols, span, warps, num_stages=2, precision="tf32x3" if warp_size == 32 else "ieee")


@torch.no_grad()
def partial_momentum_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    exp_avgs: Sequence[Tensor] | None,
    lefts: Sequence[Tensor] | None,
    rights: Sequence[Tensor] | None,
    exp_avg_sqs: Sequence[Tensor] | None,
    row_sqs: Sequence[Tensor] | None,
    col_sqs: Sequence[Tensor] | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rule: MomentumRule,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.lowrank.partial_momentum_update_`."""
    if not params:
        return
    form = form_of(exp_avgs, lefts, rights, exp_avg_sqs, row_sqs, col_sqs)
    beta1, beta2 = betas
    hyper = {
        "lr": device_scalar(lr), "weight_decay": float(weight_decay), "eps": float(eps),
        # taken here, in double precision: 1 - 0.999f is off by 1e-5 of itself
        "one_minus_beta1": 1 - beta1, "one_minus_beta2": 1 - beta2,
        "log_beta1": log_of(beta1), "log_beta2": log_of(beta2), "beta1": float(beta1),
        "carry": rule.residual_scale * beta1 / (1 - beta1), "gamma": float(rule.residual_scale),
        "damping": rule.damping, "pull": rule.damping * (1 - beta1),
        "every": rule.every, "clip_element": rule.clip_of("elem"), "clip_rms": rule.clip_of("rms"),
    }  # fmt: skip
    columns = [params, grads, steps, exp_avgs, lefts, rights, exp_avg_sqs, row_sqs, col_sqs]
    for schedule, table, pointers in _schedules(columns, form, rounding.keys(len(params))):
        arguments = update_arguments(params, grads, schedule.kind.layout, transform, rounding)
        given = {**arguments, **hyper, "table_ptr": table, "addresses_ptr": pointers, "matrices": schedule.matrices}
        _run(schedule, form, rule, given)
    # the kernels wrote through addresses, which autograd cannot see: tell it that saved parameters are stale
    torch.autograd.graph.increment_version(params)


def keeps(form: Form, kind: Kind, rule: MomentumRule) -> str:
    """Return what a gradient that is not finite stops: the "element", the "row" or the "parameter"."""
    if rule.clip_of("rms") is not None or form.momentum == "lowrank":
        return "parameter"
    return "element" if form.second == "element" else "row" if kind.resident else "parameter"


def _run(schedule: Schedule, form: Form, rule: MomentumRule, given: dict[str, Any]) -> None:
    """All launches over the matrices of a schedule."""
    kind, table = schedule.kind, given["table_ptr"]
    device = table.device
    plan = plan_momentum(kind, device_facts(device).warp_size)
    lowrank = form.momentum == "lowrank"
    owners = len(schedule.members)
    # what is summed up over a side that no program has as a whole
    summed = form.second != "element" and not kind.resident
    sizes = {
        "left_ptr": schedule.left, "right_ptr": schedule.right, "small_ptr": 4 * schedule.matrices * kind.rank**2,
        "row_sums_ptr": schedule.rows, "col_sums_ptr": schedule.cols,
        "mean_ptr": schedule.matrices, "partial_ptr": schedule.tiles, "clip_ptr": owners,
    }  # fmt: skip
    scratch = torch.empty(sum(map(vectors, sizes.values())), dtype=torch.float32, device=device)
    parts = dict(zip(sizes, scratch.split([*map(vectors, sizes.values())]), strict=True))
    given = {
        **given, **parts, "bad_ptr": torch.zeros(owners, dtype=torch.int32, device=device),
        "counter_ptr": counters(owners, device), "row_blocks": schedule.row_blocks,
        "LOWRANK": lowrank, "SUMS": form.second in ("cols", "factored"), "MOMENTUM": form.momentum,
        "SECOND": form.second, "RESIDENT": kind.resident, "KEEP": keeps(form, kind, rule),
        "PRECISION": plan.precision, "RANK": kind.rank or LEAST_RANK, "SPAN": plan.span, "BLOCK": MOMENT_BLOCK,
        "num_warps": plan.num_warps, "num_stages": plan.num_stages,
    }  # fmt: skip
    tile = {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n}
    problem = {"BLOCK_M": PROBLEM_BLOCK, "BLOCK_N": PROBLEM_BLOCK, "num_warps": PROBLEM_WARPS}
    with launching_on(device):
        if lowrank or (summed and form.second != "cols"):
            _start(kernels._row_pass_kernel, schedule.row_blocks, given, **tile)
        if lowrank:
            _start(kernels._left_problem_kernel, schedule.matrices, given, **problem)
        if lowrank or (summed and form.second != "rows"):
            _start(kernels._col_pass_kernel, schedule.col_blocks, given, **tile)
        if lowrank:
            _start(kernels._right_problem_kernel, schedule.matrices, given, **problem)
            _start(kernels._exchange_kernel, schedule.row_blocks + schedule.col_blocks, given, **tile)
        if summed:
            _start(kernels._group_moments_kernel, schedule.matrices, given)
        if given["clip_rms"] is not None:
            _start(kernels._momentum_update_kernel, schedule.tiles, given, WRITE=False, **tile)
        _start(kernels._momentum_update_kernel, schedule.tiles, given, WRITE=True, **tile)


def _start(kernel: Any, programs: int, given: dict[str, Any], **tile: Any) -> None:
    """Launch a kernel with those arguments that it takes."""
    if programs == 0:
        return
    arguments = {**given, **tile}
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    kernel[(programs,)](**taken_by(kernel, arguments), **options)


def _schedules(
    columns: Sequence[Sequence[Tensor] | None], form: Form, keys: tuple[int, ...]
) -> list[tuple[Schedule, Tensor, Tensor]]:
    """(schedule, its table, its addresses on the device) of each kind that occurs."""
    params, grads, _, _, _, rights, _, row_sqs, col_sqs = columns
    assert params is not None
    assert grads is not None
    where = addresses(columns)
    # the counter's place is no one's concern
    aligned = starts_aligned(where[:, [0, 1, 3, 4, 5, 6, 7, 8]])
    strides = strides_of(params, grads)

    def make() -> tuple[Schedule, ...]:
        moments = moments_of(params, rights, row_sqs, col_sqs)
        return _schedules_of(geometries_of(params, strides), moments, tuple(aligned.tolist()), keys, form)

    what = ("lowrank", strides, aligned.tobytes(), keys, form)
    return [
        (
            schedule,
            uploaded(params, schedule, schedule.values),
            uploaded(params, (schedule, "addresses"), where[schedule.members].ravel()),
        )
        for schedule in remembered([params, rights, row_sqs, col_sqs], what, make)
    ]


# for plain lists, of which nothing is remembered
_schedules_of = lru_cache(maxsize=64)(schedules_of)
