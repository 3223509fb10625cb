"""The verb in torch: the specification of the kernel, and the path that CPUs take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem_kernels.elementwise.reference import update_blocks_
from lowmem_kernels.options import GradTransform, Rounding
from lowmem_kernels.shards import Shard


def lion_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    shards: Sequence[Shard | None] | None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lion_kernels.lion_`."""
    lr, (beta1, beta2) = float(lr), betas

    def update(step: int, p: Tensor, g: Tensor, m: Tensor) -> None:
        mixed = (m * beta1).add_(g * (1 - beta1))
        # NaN has the sign 0 in torch: where it is not skipped, it has to be seen
        sign = torch.where(mixed.isnan(), mixed, mixed.sign())
        # one product or sum at a time, in the kernel's order: then both have the same bits
        p.sub_((p * weight_decay).add_(sign).mul_(lr))
        m.add_((g - m).mul_(1 - beta2))

    update_blocks_(update, (params, exp_avgs), grads, steps, shards, transform, rounding)
