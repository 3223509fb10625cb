"""A family of one verb, as those in lowmem_kernels are: Lion's update of many tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowmem_kernels.dispatch import implementation
from lowmem_kernels.elementwise.checks import check_lists, check_shards
from lowmem_kernels.options import GradTransform, Rounding
from lowmem_kernels.shards import Shard

__all__ = ["lion_"]


def lion_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    shards: Sequence[Shard | None] | None = None,
    transform: GradTransform = GradTransform(),
    rounding: Rounding = Rounding(),
    backend: str = "auto",
) -> None:
    """Update parameters by Lion, in place.

    ``p -= lr (sign(b1 m + (1 - b1) g) + weight_decay p)``, ``m += (1 - b2) (g - m)``

    Args:
        params: p, written.
        grads: read as ``transform`` says.
        exp_avgs: m, float32 or of the parameters' dtype where that is bfloat16, contiguous, written.
        steps: counters of updates, 0-d float32, advanced by one; only the rounding noise depends on them.
        lr: step length, in units of the parameter for each update; a float or a 0-d tensor.
        betas: (b1, b2) in [0, 1): the share of m in the update, and its decay rate.
        weight_decay: decoupled, multiplied by lr.
        shards, transform, rounding, backend: as in `lowmem_kernels.elementwise.adamw_`.

    Traffic: with elements of e bytes and states of s bytes, reads 2e + s and writes e + s for each element; 10 bytes
    where all are bfloat16.

    Raises: as `lowmem_kernels.elementwise.adamw_`.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), algorithm 2.
    """
    check_lists(params, grads, steps, exp_avgs=exp_avgs)
    check_shards(params, shards)
    implementation(__name__, backend, (*params[:1], *grads[:1], *exp_avgs[:1])).lion_(
        params, grads, exp_avgs, steps,
        lr=lr, betas=betas, weight_decay=weight_decay, shards=shards, transform=transform, rounding=rounding,
    )  # fmt: skip
