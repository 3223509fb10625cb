"""Launching the elementwise kernels: plans, tables, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import TRITON_DTYPES, device_scalar, log_of, update_arguments
from ..device import device_facts, launching_on
from ..options import GradTransform, Rounding
from ..shards import Shard
from ..table import Layout, counters, tables
from .kernels import _adamw_kernel, _grad_stats_kernel, _scaled_update_kernel

#: Warps of every program: with fewer, long-latency loads are not covered; with more, the last block of a tensor wastes
#: more lanes.
NUM_WARPS = 4

#: Partial sums of grad_stats. A constant, so that the bits of a norm are the same on every device; about eight
#: programs of four warps for each processor of an H100, which is enough to keep its memory busy.
STATS_PROGRAMS = 1024


@dataclass(frozen=True)
class ElementwisePlan:
    """Elements of a program, elements it holds in registers at a time, warps."""

    tile: int
    block: int
    num_warps: int


def plan_tile(numel: int) -> int:
    """Return the elements of one program for ``numel`` elements in all.

    Long tiles share the cost of finding the row (eight dependent loads for 200 tensors) and of the step counter's
    atomic; below 2**24 elements they would leave some of about a thousand program slots of an H100 idle. Computed, not
    measured.
    """
    return 16384 if numel >= 1 << 24 else 2048


def plan_elementwise(tile: int, layout: Layout, warp_size: int) -> ElementwisePlan:
    """Return the plan of one launch. No result depends on it, but for the order in which grad_stats adds.

    Aligned: 8 elements for each thread are one 16-byte access of bfloat16 and two of float32, at 76 registers for
    AdamW on sm_90. Otherwise accesses are single elements with an address each, and 8 of them would take 194
    registers; strided ones divide 64-bit numbers as well, and spill from 4 on. Shards in pieces have a 64-bit place for
    each element, and take 168 registers for 8.
    """
    per_thread = (4 if layout.digits > 1 else 8) if layout.aligned else 2 if layout.strided else 4
    return ElementwisePlan(tile=tile, block=per_thread * warp_size * NUM_WARPS, num_warps=NUM_WARPS)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    shards: Sequence[Shard | None] | None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.elementwise.adamw_`: one launch for each layout that occurs."""
    beta1, beta2 = betas
    launch_update(
        _adamw_kernel, (params, grads, exp_avgs, exp_avg_sqs, steps), shards, transform, rounding,
        lr=device_scalar(lr), weight_decay=float(weight_decay), eps=float(eps),
        # 1 - beta and log(beta) are taken here, in double precision: 1 - 0.999f is off by 1e-5 of itself
        one_minus_beta1=1 - beta1, one_minus_beta2=1 - beta2, log_beta1=log_of(beta1), log_beta2=log_of(beta2),
        STATE=TRITON_DTYPES[exp_avgs[0].dtype] if exp_avgs else None,
    )  # fmt: skip


def scaled_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    shards: Sequence[Shard | None] | None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.elementwise.scaled_update_`: one launch for each layout that occurs."""
    launch_update(
        _scaled_update_kernel, (params, grads, steps), shards, transform, rounding,
        lr=device_scalar(lr), weight_decay=float(weight_decay),
    )  # fmt: skip


def grad_stats(grads: Sequence[Tensor]) -> Tensor:
    """As `lowmem_kernels.elementwise.grad_stats`: one launch for each layout that occurs."""
    device = grads[0].device
    results = []
    for table in tables((grads, grads), [0] * len(grads), plan_tile(sum(map(Tensor.numel, grads)))):
        plan = plan_elementwise(table.tile, table.layout, device_facts(device).warp_size)
        partial = torch.empty(2 * STATS_PROGRAMS, dtype=torch.float32, device=device)
        results.append(torch.empty(2, dtype=torch.float32, device=device))
        with launching_on(device):
            _grad_stats_kernel[(min(table.tiles, STATS_PROGRAMS),)](
                table.values, counters(1, device), partial, results[-1], table.rows, table.tiles,
                GRAD=TRITON_DTYPES[grads[0].dtype], ALIGNED=table.layout.aligned, STRIDED=table.layout.strided,
                TILE=plan.tile, BLOCK=plan.block, PROGRAMS=STATS_PROGRAMS,
                num_warps=plan.num_warps, enable_fp_fusion=False,
            )  # fmt: skip
    return results[0] if len(results) == 1 else torch.stack(results).sum(0)


def launch_update(
    kernel: Any,
    columns: Sequence[Sequence[Tensor]],
    shards: Sequence[Shard | None] | None,
    transform: GradTransform,
    rounding: Rounding,
    **arguments: Any,
) -> None:
    """Launch the kernel of an element-wise rule, once for each layout that occurs.

    Args:
        kernel: takes `update_arguments`, and ``table_ptr, counter_ptr, rows, DIGITS, TILE, BLOCK``.
        columns: params, grads, any states and steps, as they follow each other in the kernel's table.
        shards, transform, rounding: as the verb has them.
        **arguments: the kernel's own.
    """
    params, grads = columns[0], columns[1]
    if not params:
        return
    device = params[0].device
    tile = plan_tile(sum(map(Tensor.numel, params)))
    # without noise, it does not matter which elements they are
    noisy = shards if rounding.stochastic else None
    for table in tables(columns[:-1], rounding.keys(len(params)), tile, scalars=columns[-1:], shards=noisy):
        plan = plan_elementwise(table.tile, table.layout, device_facts(device).warp_size)
        with launching_on(device):
            kernel[(table.tiles,)](
                table_ptr=table.values, counter_ptr=counters(table.rows, device), rows=table.rows,
                TILE=plan.tile, BLOCK=plan.block, DIGITS=table.layout.digits, num_warps=plan.num_warps,
                **update_arguments(params, grads, table.layout, transform, rounding), **arguments,
            )  # fmt: skip
    # the kernel wrote through addresses, which autograd cannot see: tell it that saved parameters are stale
    torch.autograd.graph.increment_version(params)
