"""Whitening: updates whose singular values are all about 1, from nothing but the gradient (SWAN).

Of each matrix G of m rows and n columns, over the last two dimensions of a parameter or as ``rule.conv`` says:

    X = G, with rows centred and divided by their standard deviation, or as ``rule.normalize`` says
    D = (X X^T)^(-1/2) X, approximated by ``rule.solver``, and rescaled to a root mean square of 1

Every verb takes lists. Within a list all tensors have one dtype and one device, and two or more dimensions; parameters
and gradients are float32, bfloat16 or float16 with any strides, empty ones included. ``steps`` are 0-d float32
counters, read as t - 1 and written as t.

No matrix of the size of G is ever made, in no dtype: X is normalised whenever G is read, and D goes into the
parameter from registers. What is made are matrices of K x K, K = min(m, n), for a bounded number of parameters at a
time. Arithmetic is fp32 (see ``rule.solver``) and each result is rounded once. On a given machine the same lists give
the same bits on every run; the products of K x K matrices of equal size are batched, and a library may compute another
batch in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import implementation
from ..options import GradTransform, Rounding
from .checks import check_grads, check_whiten
from .rule import WhiteningRule

__all__ = ["WhiteningRule", "whiten_", "whitened"]


def whiten_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    scale: float,
    weight_decay: float,
    rule: WhiteningRule,
    transform: GradTransform = GradTransform(),
    rounding: Rounding = Rounding(),
    backend: str = "auto",
) -> None:
    """Update parameters by their whitened gradient, in place: ``p -= lr (scale D + weight_decay p)``.

    A parameter with a sum of squares that is NaN or Inf keeps its value and its step if ``transform.skip_nonfinite``,
    and ``transform.skipped`` counts it as one. Rows whose mean square, after centring, is below 1.2e-38 count as zero.

    Args:
        params: p, written.
        grads: G, read as ``transform`` says.
        steps: counters of updates, advanced by one; only the rounding noise depends on them.
        lr: step length, a float or a 0-d tensor.
        scale: root mean square of the update for ``lr = 1``, in units of the parameter.
        weight_decay: decoupled, multiplied by lr.
        rule: how D is made.
        transform: scaling, clipping, sign and non-finite policy of the gradient.
        rounding: how bfloat16 results are rounded; p is stream 0.
        backend: "auto", "triton" or "torch".

    Traffic: with elements of e bytes, reads 4e and writes e for each element: G for its row statistics, for its Gram
    matrix and for the update, and p. Arithmetic: 54 K³ + 3 m n K flops with the default rule, see README.md.

    Raises:
        ValueError, TypeError: lists or options that do not fit together, before anything is written.
        RuntimeError: backend="triton" where it cannot run.

    Source: Ma et al., "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training" (arXiv 2412.13148),
    algorithms 1 and 2; with ``rule.normalize="row"`` one round of multi-normalization (arXiv 2502.06742).
    """
    check_whiten(params, grads, steps)
    implementation(__name__, backend, (*params[:1], *grads[:1])).whiten_(
        params, grads, steps,
        lr=lr, scale=scale, weight_decay=weight_decay, rule=rule, transform=transform, rounding=rounding,
    )  # fmt: skip


def whitened(
    grads: Sequence[Tensor],
    *,
    rule: WhiteningRule,
    transform: GradTransform = GradTransform(),
    backend: str = "auto",
) -> list[Tensor]:
    """Return D of each gradient, contiguous float32 of its shape, for what is more than one step of a sequence.

    Args:
        grads: G, read as ``transform`` says.
        rule: how D is made.
        transform: scaling, clipping and sign of the gradient. What is not finite makes its matrix NaN; what to do
            about it is for whoever applies it, so ``found_inf`` and ``skipped`` are not looked at.
        backend: "auto", "triton" or "torch".

    Traffic: with elements of e bytes, reads 3e and writes 4 for each element.

    Raises, Source: as `whiten_`.
    """
    check_grads(grads)
    result: list[Tensor] = implementation(__name__, backend, grads[:1]).whitened(grads, rule=rule, transform=transform)
    return result
