"""Launching the kernel. Table, plan and launch are those of all element-wise rules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowmem_kernels.arguments import TRITON_DTYPES, device_scalar
from lowmem_kernels.elementwise.launch import launch_update
from lowmem_kernels.options import GradTransform, Rounding
from lowmem_kernels.shards import Shard

from .kernels import _lion_kernel


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
    """As `lion_kernels.lion_`: one launch for each layout that occurs."""
    beta1, beta2 = betas
    launch_update(
        _lion_kernel, (params, grads, exp_avgs, steps), shards, transform, rounding,
        lr=device_scalar(lr), weight_decay=float(weight_decay),
        # 1 - beta is taken here, in double precision, as the reference takes it
        beta1=float(beta1), one_minus_beta1=1.0 - beta1, one_minus_beta2=1.0 - beta2,
        STATE=TRITON_DTYPES[exp_avgs[0].dtype] if exp_avgs else None,
    )  # fmt: skip
