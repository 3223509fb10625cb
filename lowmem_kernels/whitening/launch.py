"""Launching the whitening kernels: plans, and for each group of equal problems two launches and the solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..arguments import device_scalar, taken_by, update_arguments
from ..device import device_facts, launching_on
from ..options import GradTransform, Rounding
from ..schedules import remembered_schedules
from ..table import Layout, addresses, starts_aligned, uploaded
from .kernels import _advance_kernel, _gram_kernel, _row_stats_kernel, _whiten_apply_kernel
from .rule import WhiteningRule
from .schedule import STATS_COLS, STATS_ROWS, Group, Schedule, schedules_of
from .solver import inverse_root

#: Warps of a program that takes row statistics: 16 elements for each thread.
STATS_WARPS = 4

#: Parameters of one program that advances steps.
ADVANCE_BLOCK = 128


@dataclass(frozen=True)
class WhiteningPlan:
    """Products over tiles of X: side of a tile, its depth, warps, stages of the pipeline, precision of tl.dot."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int
    precision: str


def plan_products(block: int, exact: bool, layout: Layout, warp_size: int) -> WhiteningPlan:
    """Return the plan of the Gram and apply kernels.

    Three TF32 products stand for one of fp32 ("tf32x3"): as good as fp32, and several times as fast as an H100's fp32
    units. AMD's compiler takes "ieee" only. A thread has 64 sums with 8 warps for a tile of 128, 32 with 4 for one of
    64; elements that are accessed one by one take registers for their addresses, and with 4 warps spill. So do tiles of
    depth 32 in three products on sm_80, badly: 16 is the least that a 16-byte access of bfloat16 can serve.
    """
    precision = ("tf32x3" if exact else "tf32") if warp_size == 32 else "ieee"
    warps = 8 if block == 128 or not layout.aligned else 4
    return WhiteningPlan(block, 16 if precision == "tf32x3" else 32, num_warps=warps, num_stages=2, precision=precision)


@torch.no_grad()
def whiten_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    scale: float,
    weight_decay: float,
    rule: WhiteningRule,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.whitening.whiten_`: two launches for each layout, and two and the solver for each group."""
    if not params:
        return
    keys = rounding.keys(len(params))
    hyper = {"lr": device_scalar(lr), "update_scale": float(scale), "weight_decay": float(weight_decay)}
    for schedule, table, pointers in _schedules(params, grads, steps, keys, rule):
        arguments = update_arguments(params, grads, schedule.layout, transform, rounding)
        bad = _run(schedule, table, pointers, rule, {**arguments, **hyper, "UPDATE": True})
        owners = len(schedule.members)
        with launching_on(params[0].device):
            _advance_kernel[(-(-owners // ADVANCE_BLOCK),)](
                pointers, bad, transform.skipped, transform.found_inf, owners,
                BLOCK=ADVANCE_BLOCK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    # the kernel wrote through addresses, which autograd cannot see: tell it that saved parameters are stale
    torch.autograd.graph.increment_version(params)


@torch.no_grad()
def whitened(grads: Sequence[Tensor], *, rule: WhiteningRule, transform: GradTransform) -> list[Tensor]:
    """As `lowmem_kernels.whitening.whitened`: the launches of `whiten_`, but for the last."""
    results = [torch.empty(g.shape, dtype=torch.float32, device=g.device) for g in grads]
    if not results:
        return results
    given = GradTransform(
        inv_scale=transform.inv_scale, clip_value=transform.clip_value, clip_coef=transform.clip_coef,
        maximize=transform.maximize, skip_nonfinite=False,
    )  # fmt: skip
    nothing = {"lr": None, "update_scale": 0.0, "weight_decay": 0.0}
    for schedule, table, pointers in _schedules(results, grads, None, (0,) * len(results), rule):
        arguments = update_arguments(results, grads, schedule.layout, given, Rounding())
        _run(schedule, table, pointers, rule, {**arguments, **nothing, "UPDATE": False})
    return results


def _run(schedule: Schedule, table: Tensor, pointers: Tensor, rule: WhiteningRule, arguments: dict[str, Any]) -> Tensor:
    """Whiten and apply all matrices of a schedule. Returns the parameters' flags: not 0 where sums are not finite."""
    device = table.device
    stats = torch.empty(2 * schedule.rows, dtype=torch.float32, device=device)
    bad = torch.zeros(len(schedule.members), dtype=torch.int32, device=device)
    given = {**arguments, "table_ptr": table, "addresses_ptr": pointers, "stats_ptr": stats, "all_rows": schedule.rows}
    if schedule.stats_tiles:
        with launching_on(device):
            _row_stats_kernel[(schedule.stats_tiles,)](
                **taken_by(_row_stats_kernel, given), bad_ptr=bad, matrices=schedule.matrices,
                CENTRE=rule.centred, NORMALIZE=rule.normalize is not None,
                BLOCK_M=STATS_ROWS, BLOCK_N=STATS_COLS, num_warps=STATS_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    for group in schedule.groups:
        _whiten_group(schedule, group, bad, rule, given)
    return bad


def _whiten_group(schedule: Schedule, group: Group, bad: Tensor, rule: WhiteningRule, given: dict[str, Any]) -> None:
    device = bad.device
    facts = device_facts(device)
    plan = plan_products(group.block, rule.solver == "coupled", schedule.layout, facts.warp_size)
    tiling = {
        "first": group.first, "size": group.size, "RIGHT": group.right, "PRECISION": plan.precision,
        "BLOCK": plan.block, "BLOCK_K": plan.block_k, "num_warps": plan.num_warps, "num_stages": plan.num_stages,
        "enable_fp_fusion": False,
    }  # fmt: skip
    gram = torch.empty(group.count, group.size, group.size, dtype=torch.float32, device=device)
    blocks = -(-group.size // plan.block)
    with launching_on(device):
        _gram_kernel[(group.count * blocks * (blocks + 1) // 2,)](
            **taken_by(_gram_kernel, given), gram_ptr=gram, **tiling
        )
    root, inverse = inverse_root(gram, rule, lift=group.right and rule.centred)
    with launching_on(device):
        _whiten_apply_kernel[(len(group.apply_tiles),)](
            **taken_by(_whiten_apply_kernel, given), bad_ptr=bad, root_ptr=root, inverse_ptr=inverse,
            count=group.count, first_tile=group.apply_tiles.start, **tiling,
        )  # fmt: skip


def _schedules(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor] | None,
    keys: tuple[int, ...],
    rule: WhiteningRule,
) -> list[tuple[Schedule, Tensor, Tensor]]:
    """(schedule, its table, its addresses on the device) of each layout that occurs."""
    where = addresses([params, grads, steps])
    aligned = starts_aligned(where[:, :2])
    return [
        (
            schedule,
            uploaded(params, schedule, schedule.values),
            uploaded(params, (schedule, "addresses"), where[schedule.members].ravel()),
        )
        for schedule in remembered_schedules(_schedules_of, params, grads, aligned, keys, rule.conv)
    ]


# for plain lists, of which nothing is remembered
_schedules_of = lru_cache(maxsize=64)(schedules_of)
