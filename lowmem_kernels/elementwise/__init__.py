"""Element-wise rules over many tensors in one launch: AdamW, LOMO's scaled update, and sums over all gradients.

Every verb takes lists with one entry for each parameter. Within a list all tensors have one dtype and one device;
parameters and gradients are float32, bfloat16 or float16 and of any shape and strides, empty ones included. States are
contiguous. ``steps`` are 0-d float32 counters on the parameters' device: they count the updates a parameter has had,
are read as t - 1 and written as t, and stay where nothing was written because of ``found_inf``.

Arithmetic is fp32 and each result is rounded once. All three are deterministic: the same bits on every run, whatever
else is in the lists.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import implementation
from ..options import GradTransform, Rounding
from ..shards import Shard
from .checks import check_grads, check_lists, check_shards

__all__ = ["adamw_", "grad_stats", "scaled_update_"]


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
    shards: Sequence[Shard | None] | None = None,
    transform: GradTransform = GradTransform(),
    rounding: Rounding = Rounding(),
    backend: str = "auto",
) -> None:
    """Update parameters by AdamW, in place.

    ``m += (1 - b1) (g - m)``, ``v += (1 - b2) (g² - v)``,
    ``p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + lr weight_decay p``

    Args:
        params: p, written.
        grads: read as ``transform`` says.
        exp_avgs, exp_avg_sqs: m and v, both float32 or both of the parameters' dtype, contiguous, written.
        steps: counters of updates, advanced by one.
        lr: step length, in units of the parameter for each normalized update; a float or a 0-d tensor.
        betas: decay rates (b1, b2) in [0, 1).
        eps: added to the square root, in units of the gradient.
        weight_decay: decoupled, multiplied by lr.
        shards: which part of a whole tensor each parameter is, None where it is all of it; rounding noise is then that
            of its elements there. None: all of them are whole.
        transform: scaling, clipping, sign and non-finite policy of the gradient.
        rounding: how bfloat16 results are rounded.
        backend: "auto", "triton" or "torch".

    Traffic: with elements of e bytes and states of s bytes, reads 2e + 2s and writes e + 2s for each element; 22 bytes
    for bfloat16 with float32 states, 14 with bfloat16 states, 28 in float32.

    Raises:
        ValueError, TypeError: lists that do not fit together, before anything is written.
        RuntimeError: backend="triton" where it cannot run.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2, with the
    decay multiplied by lr as torch.optim.AdamW does.
    """
    check_lists(params, grads, steps, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    check_shards(params, shards)
    implementation(__name__, backend, (*params[:1], *grads[:1], *exp_avgs[:1])).adamw_(
        params, grads, exp_avgs, exp_avg_sqs, steps,
        lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, shards=shards, transform=transform, rounding=rounding,
    )  # fmt: skip


def scaled_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    shards: Sequence[Shard | None] | None = None,
    transform: GradTransform = GradTransform(),
    rounding: Rounding = Rounding(),
    backend: str = "auto",
) -> None:
    """Update parameters by their scaled gradient, LOMO's rule, in place: ``p -= lr (g + weight_decay p)``.

    Args:
        params: p, written.
        grads: read as ``transform`` says, which holds LOMO's loss scale, value clipping and norm clipping.
        steps: counters of updates, advanced by one; only the rounding noise depends on them.
        lr: step length, in units of the parameter for a unit of gradient; a float or a 0-d tensor.
        weight_decay: decoupled, multiplied by lr.
        shards, transform, rounding, backend: as in `adamw_`.

    Traffic: reads 2e and writes e bytes for each element: 6 bytes for bfloat16, 12 for float32.

    Raises: as `adamw_`.

    Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (arXiv 2306.09782).
    """
    check_lists(params, grads, steps)
    check_shards(params, shards)
    implementation(__name__, backend, (*params[:1], *grads[:1])).scaled_update_(
        params, grads, steps, lr=lr, weight_decay=weight_decay, shards=shards, transform=transform, rounding=rounding
    )


def grad_stats(grads: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Return ``[sum of squares of all elements, number of NaN and Inf elements]`` as float32 on the gradients' device.

    The square root of the first is the global gradient norm; the second says whether a step may be taken. The sum is
    fp32, so elements above 1.8e19 overflow it, and it is NaN or Inf wherever an element is.

    Args:
        grads: at least one tensor, all of one dtype and device.
        backend: "auto", "triton" or "torch".

    Traffic: reads e bytes for each element.

    Raises:
        ValueError: the list is empty or mixes dtypes or devices.
        RuntimeError: backend="triton" where it cannot run.
    """
    check_grads(grads)
    result: Tensor = implementation(__name__, backend, grads[:1]).grad_stats(grads)
    return result
