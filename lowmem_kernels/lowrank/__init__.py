"""Partial momentum: Adam whose first moment is left out, kept, or kept as two thin factors (AdaPM).

The verb takes lists. Within a list all tensors have one dtype and one device; parameters and gradients are float32,
bfloat16 or float16 of any shape and strides, empty ones included. States are contiguous float32. ``steps`` are 0-d
float32 counters, read as t - 1 and written as t.

Arithmetic is fp32 (products of tiles are as good as fp32) and each result is rounded once. Nothing of the gradient's
size is made. The same bits on every run, whatever else is in the lists.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import implementation
from ..options import GradTransform, Rounding
from .checks import check_lists, form_of
from .rule import MAX_RANK, MomentumRule

__all__ = ["MAX_RANK", "MomentumRule", "partial_momentum_update_"]


def partial_momentum_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    exp_avgs: Sequence[Tensor] | None = None,
    lefts: Sequence[Tensor] | None = None,
    rights: Sequence[Tensor] | None = None,
    exp_avg_sqs: Sequence[Tensor] | None = None,
    row_sqs: Sequence[Tensor] | None = None,
    col_sqs: Sequence[Tensor] | None = None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rule: MomentumRule = MomentumRule(),
    transform: GradTransform = GradTransform(),
    rounding: Rounding = Rounding(),
    backend: str = "auto",
) -> None:
    """Update parameters by Adam with a partial momentum, in place: ``p -= lr (clip(U / (sqrt(v̂) + eps)) + decay p)``.

    U is the momentum without bias. By which lists are given:

    - ``exp_avgs``: full. ``m += (1 - b1)(g - m)``, ``U = m / (1 - b1^t)``.
    - ``lefts`` and ``rights``: low rank. With ``A = b1 L R + (1 - b1) g``, new L and R of rank r with ``L R ~ A``, and
      the residual ``r = A - L R``: ``U = L R / (1 - b1^t) + residual_scale r / (1 - b1)``. Neither A nor r is made.
    - none of them: none. ``U = g``.

    v is the mean of g², ``v += (1 - b2)(mean(g²) - v)``, ``v̂ = v / (1 - b2^t)``:

    - ``exp_avg_sqs``: of each element.
    - ``row_sqs`` or ``col_sqs``: of groups of as many consecutive rows (columns) as there are rows for each entry: one
      for each row, each head, or for all of the parameter. A vector is one row.
    - both: of each row and of each column, as ``row col / mean(row)``.

    A NaN or Inf in a gradient keeps, if ``transform.skip_nonfinite``, what it would reach and ``transform.skipped``
    counts: the element, where nothing is summed up; the row, where v is of single rows; else the parameter, with its
    state and step. With update_clip=("rms", d) it is always the parameter.

    Args:
        params: p, written. With lefts or col_sqs the last two dimensions are matrices, and those before them a stack.
        grads: g, read as ``transform`` says.
        steps: counters of updates, advanced by one.
        exp_avgs: m, of the parameters' shapes, written.
        lefts, rights: L [..., m, r] and R [..., r, n], written; r <= MAX_RANK. At the start L is 0, and the rows of R
            are independent and of length about 1, as they then stay.
        exp_avg_sqs: v of the parameters' shapes, written.
        row_sqs, col_sqs: v of groups of rows and columns, [groups] or [..., groups], written.
        lr: step length, in units of the parameter for each normalized update; a float or a 0-d tensor.
        betas: decay rates (b1, b2) in [0, 1).
        eps: added to the square root, in units of the gradient, > 0.
        weight_decay: decoupled, multiplied by lr.
        rule: how L and R follow, what is clipped.
        transform: scaling, clipping, sign and non-finite policy of the gradient.
        rounding: how bfloat16 parameters are rounded; p is stream 0.
        backend: "auto", "triton" or "torch".

    Traffic: for each element of e bytes, p is read and written once, g is read once, v and m of the parameter's shape
    are read and written once. More reads of g: two with low-rank factors (one with solver="fixed"). Without them, one
    with v of groups that are not single rows, two with both row_sqs and col_sqs. With update_clip=("rms", d) one more
    of g, v and m. See README.md.

    Raises:
        ValueError, TypeError: lists or options that do not fit together, before anything is written.
        RuntimeError: backend="triton" where it cannot run.

    Source: Zhang, Liu and Fang, "AdaPM" (arXiv 2510.09103), of which the text was not at hand: the low-rank rule is a
    reconstruction, see docs/optimizers/adapm.md. Groups: "Adam-mini" (arXiv 2406.16793). Rows and columns: Adafactor
    (arXiv 1804.04235).
    """
    form = form_of(exp_avgs, lefts, rights, exp_avg_sqs, row_sqs, col_sqs)
    check_lists(
        params, grads, steps, form,
        exp_avgs=exp_avgs, lefts=lefts, rights=rights, exp_avg_sqs=exp_avg_sqs, row_sqs=row_sqs, col_sqs=col_sqs,
    )  # fmt: skip
    implementation(__name__, backend, (*params[:1], *grads[:1])).partial_momentum_update_(
        params, grads, steps,
        exp_avgs=exp_avgs, lefts=lefts, rights=rights, exp_avg_sqs=exp_avg_sqs, row_sqs=row_sqs, col_sqs=col_sqs,
        lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rule=rule, transform=transform, rounding=rounding,
    )  # fmt: skip
