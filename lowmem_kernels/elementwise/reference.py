"""The elementwise rules in torch: the specification of the kernels, and the path that CPUs take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..blocks import blocks, found_inf, read_gradient, store_, sum_is_finite
from ..options import GradTransform, Rounding
from ..rounding import stream_key
from ..shards import Shard


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
    """As `lowmem_kernels.elementwise.adamw_`."""
    lr, (beta1, beta2) = float(lr), betas

    def update(step: int, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        m.lerp_(g, 1 - beta1)
        v.lerp_(g * g, 1 - beta2)
        step_size = lr / (1 - beta1**step)
        denominator = v.sqrt().mul_(1 / math.sqrt(1 - beta2**step)).add_(eps)
        # one subtraction: p * (1 - lr * weight_decay) would repeat the same rounding error of the factor every step
        p.sub_(torch.div(m, denominator, out=denominator).mul_(step_size).add_(p, alpha=lr * weight_decay))

    update_blocks_(update, (params, exp_avgs, exp_avg_sqs), grads, steps, shards, transform, rounding)


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
    """As `lowmem_kernels.elementwise.scaled_update_`."""
    lr = float(lr)

    def update(step: int, p: Tensor, g: Tensor) -> None:
        p.sub_((g * lr).add_(p, alpha=lr * weight_decay))

    update_blocks_(update, (params,), grads, steps, shards, transform, rounding)


@torch.no_grad()
def grad_stats(grads: Sequence[Tensor]) -> Tensor:
    """As `lowmem_kernels.elementwise.grad_stats`."""
    squares, nonfinite = 0.0, 0
    for grad in grads:
        for _, (block,) in blocks(grad):
            values = block.float()
            square = values.square().sum().item()
            squares += square
            if not math.isfinite(square):
                nonfinite += int(values.isfinite().logical_not().sum())
    return torch.tensor([squares, nonfinite], dtype=torch.float32, device=grads[0].device)


@torch.no_grad()
def update_blocks_(
    update: Callable[..., None],
    targets: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    shards: Sequence[Shard | None] | None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """Run ``update(step, parameter, gradient, *states)``, which changes fp32 blocks in place, over all tensors.

    Args:
        update: an element-wise rule. Its gradient is as ``transform`` says, ``step`` is the update's number, from 1.
        targets: parameters, and lists of states; each is rounded once, with the noise of its place here.
        grads, steps, shards, transform, rounding: as the verb has them.
    """
    if found_inf(transform):
        return
    for index, (grad, key) in enumerate(zip(grads, rounding.keys(len(grads)), strict=True)):
        step = int(steps[index].add_(1))
        shard = None if shards is None else shards[index]
        for start, (gradient, *stored) in blocks(grad, *(tensors[index] for tensors in targets)):
            g, unscaled = read_gradient(gradient, transform)
            usable = _usable(g, unscaled, transform)
            values = [x.to(torch.float32, copy=usable is not None) for x in stored]
            update(step, values[0], g, *values[1:])
            for stream, (target, value) in enumerate(zip(stored, values, strict=True)):
                if usable is not None:
                    value = torch.where(usable, value, target)
                store_(target, value, rounding.stochastic, stream_key(key, step, stream), start, shard)


def _usable(g: Tensor, unscaled: Tensor, transform: GradTransform) -> Tensor | None:
    """Which elements may be used; None: all of them."""
    # a sum that overflows only costs the masks that it asks for
    if not transform.skip_nonfinite or (sum_is_finite(unscaled) and (g is unscaled or sum_is_finite(g))):
        return None
    usable = unscaled.isfinite() & g.isfinite()
    if transform.skipped is not None:
        transform.skipped.add_(usable.logical_not().sum())
    return usable
