"""The elementwise rules in torch: the specification of the kernels, and the path that CPUs take.

Work goes in blocks that stay in a core's cache, so that a step costs one trip through memory and a few MB of
temporaries however large a tensor is. Everything may wait for the device: this path is not made for GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..numerics import STOCHASTIC_DTYPES
from ..options import GradTransform, Rounding
from ..rounding import store_stochastic_, stream_key

#: Elements worked on at a time: 512 KiB of fp32 for each of about four temporaries. Twice as fast with stochastic
#: rounding as half of it, where the calls cost as much as the arithmetic.
BLOCK = 1 << 17


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

    _update_(update, (params, exp_avgs, exp_avg_sqs), grads, steps, transform, rounding)


def scaled_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.elementwise.scaled_update_`."""
    lr = float(lr)

    def update(step: int, p: Tensor, g: Tensor) -> None:
        p.sub_((g * lr).add_(p, alpha=lr * weight_decay))

    _update_(update, (params,), grads, steps, transform, rounding)


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
def _update_(
    update: Callable[..., None],
    targets: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """Run ``update(step, parameter, gradient, *states)``, which changes fp32 blocks in place, over all tensors."""
    if transform.found_inf is not None and transform.found_inf.item() != 0:
        return
    for index, (grad, key) in enumerate(zip(grads, rounding.keys(len(grads)), strict=True)):
        step = int(steps[index].add_(1))
        for start, (gradient, *stored) in blocks(grad, *(tensors[index] for tensors in targets)):
            g, usable = read_gradient(gradient, transform)
            values = [x.to(torch.float32, copy=usable is not None) for x in stored]
            update(step, values[0], g, *values[1:])
            for stream, (target, value) in enumerate(zip(stored, values, strict=True)):
                if usable is not None:
                    value = torch.where(usable, value, target)
                if rounding.stochastic and target.dtype in STOCHASTIC_DTYPES:
                    store_stochastic_(target, value, stream_key(key, step, stream), start)
                elif value is not target:
                    target.copy_(value)


def blocks(*tensors: Tensor, start: int = 0) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Cut tensors of one shape into views of at most BLOCK elements: (index of the first element, views) in order."""
    numel = tensors[0].numel()
    if all(t.is_contiguous() for t in tensors):
        flat = [t.view(-1) for t in tensors]
        for begin in range(0, numel, BLOCK):
            yield start + begin, [t[begin : begin + BLOCK] for t in flat]
    elif numel <= BLOCK:
        yield start, tensors
    else:
        row = numel // len(tensors[0])
        rows = BLOCK // row
        for i in range(0, len(tensors[0]), max(1, rows)):
            yield from blocks(*(t[i : i + rows] if rows else t[i] for t in tensors), start=start + i * row)


def read_gradient(grad: Tensor, transform: GradTransform) -> tuple[Tensor, Tensor | None]:
    """Return the gradient as ``transform`` says, in fp32, and which elements may be used (None: all of them).

    The result may share memory with ``grad``.
    """
    g = grad.to(torch.float32)
    if transform.inv_scale is not None:
        g = g * transform.inv_scale
    if transform.maximize:
        g = -g
    unscaled = g
    if transform.clip_value is not None:
        g = g.clamp(-transform.clip_value, transform.clip_value)
    if transform.clip_coef is not None:
        g = g * transform.clip_coef
    if not transform.skip_nonfinite or (_sum_is_finite(unscaled) and (g is unscaled or _sum_is_finite(g))):
        return g, None
    usable = unscaled.isfinite() & g.isfinite()
    if transform.skipped is not None:
        transform.skipped.add_(usable.logical_not().sum())
    return g, usable


def _sum_is_finite(x: Tensor) -> bool:
    # a sum is 20 times cheaper than isfinite(); one that overflows only costs the masks that it asks for
    return math.isfinite(x.sum().item())
