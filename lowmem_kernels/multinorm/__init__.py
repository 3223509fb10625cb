"""Stateless multi-normalization over many tensors: SinkGD, its one-sided relatives, and any sequence of such norms.

A parameter of two or more dimensions is a stack of matrices n x m over its last two, or with ``conv`` one matrix whose
columns are all dimensions but the first; one of fewer dimensions is a single row. Every norm divides by an RMS, so that
X keeps the RMS 1:

    row:        X_ij <- sqrt(m) X_ij / |X_i.|        col:   X_ij <- sqrt(n) X_ij / |X_.j|
    frobenius:  X <- sqrt(n m) X / |X|               sign:  X_ij <- X_ij / |X_ij|

Whatever their sequence, ``X_ij = s_i t_j f(g_ij)`` with f the identity or the sign, so that two vectors are all that is
kept: ``s_i = sqrt(m) / |f(g_i.) t|`` and ``t_j = sqrt(n) / |f(g_.j) s|``. The gradient is read once for each pair of
norms, and once more to write ``p -= lr (scale X + weight_decay p)``; no scaled copy of it exists. Rows and columns of
zeros stay zeros, and so do those whose squares sum to less than 2**-126 (elements below 1e-19).

Every verb takes lists with one entry for each parameter, on one device. Parameters have one dtype, gradients have one:
float32, bfloat16 or float16, any shape and strides, empty ones included. ``steps`` are 0-d float32 counters, read as
t - 1 and written as t.

A parameter whose sums are NaN or Inf keeps its value, its state and its step if ``transform.skip_nonfinite``, and
``transform.skipped`` counts it as one. A rule of a single norm of rows, columns or elements has no sum over all of the
parameter: it keeps, and counts, the elements whose update would not be finite. Arithmetic is fp32, each result is
rounded once, and sums are taken in an order that depends on a parameter's shape and, on a GPU, layout in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import implementation
from ..options import GradTransform, Rounding
from ..pieces import RowPieces
from .checks import check_apply, check_grads, check_rule, check_update
from .rule import NormRule

__all__ = ["NormRule", "rank1_apply_", "sinkhorn_scales", "sinkhorn_update_"]


def sinkhorn_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    rule: NormRule,
    exp_avgs: Sequence[Tensor] | None = None,
    pieces: RowPieces | None = None,
    transform: GradTransform = GradTransform(),
    rounding: Rounding = Rounding(),
    backend: str = "auto",
) -> None:
    """Update parameters by their multi-normalized gradient, in place: ``p -= lr (scale X + weight_decay p)``.

    X is that of g, and with a momentum mu either that of ``M += (mu - 1) M + g`` (of ``g + mu M`` if nesterov), or,
    with ``momentum_after``, X is that of g, ``M += (1 - mu)(X - M)``, and M takes the place of X (``X + mu (M - X)`` if
    nesterov).

    Args:
        params: p, written.
        grads: read as ``transform`` says.
        steps: counters of updates, advanced by one.
        lr: step length, in units of the update's RMS; a float or a 0-d tensor.
        weight_decay: decoupled, multiplied by lr.
        rule: norms, scale and momentum.
        exp_avgs: M, of the parameters' shapes, float32 or the parameters' bfloat16, contiguous, written; given if and
            only if ``rule.momentum`` is not 0.
        pieces: how rows are spread over processes, None where they are all here; for matrices, and stacks unless
            ``rule.conv``. One sum of m numbers for each matrix and norm of columns; of one number for "frobenius", and
            for ``row_threshold``.
        transform: scaling, clipping, sign and non-finite policy of the gradient. Without ``eps`` and ``clip_value`` a
            scale of the gradient changes nothing.
        rounding: how bfloat16 results are rounded; p is stream 0, M stream 1.
        backend: "auto", "triton" or "torch".

    Traffic: with elements of e bytes, ``("row", "col") * L`` reads (L + 2) e and writes e for each element: 2 L + 6
    bytes for bfloat16. README.md beside this file has the rest.

    Raises:
        ValueError, TypeError: lists or options that do not fit together, before anything is written.
        RuntimeError: backend="triton" where it cannot run.

    Source: Scetbon et al., "Gradient Multi-Normalization for Stateless and Scalable LLM Training" (arXiv 2502.06742),
    algorithms 1 to 4.
    """
    check_update(params, grads, steps, rule, exp_avgs, pieces)
    implementation(__name__, backend, (*params[:1], *grads[:1])).sinkhorn_update_(
        params, grads, steps,
        lr=lr, weight_decay=weight_decay, rule=rule, exp_avgs=exp_avgs, pieces=pieces,
        transform=transform, rounding=rounding,
    )  # fmt: skip


def sinkhorn_scales(
    grads: Sequence[Tensor],
    *,
    rule: NormRule,
    transform: GradTransform = GradTransform(),
    backend: str = "auto",
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the vectors s and t of each gradient's ``X_ij = s_i t_j f(g_ij)``, with f the sign if norms has "sign".

    Args:
        grads: read as ``transform`` says.
        rule: norms, eps, row_threshold and conv; scale and momentum do not count.
        transform: scaling, clipping and sign of the gradient; found_inf and skip_nonfinite do not count.
        backend: "auto", "triton" or "torch".

    Returns s, float32 of shape [..., n] for gradients [..., n, m], and t, of shape [..., m]. With ``conv`` they are [n]
    and [all other dimensions]; for fewer than two dimensions [1] and [m]. Which of the two has a factor that all
    elements share is not said.

    Traffic: with elements of e bytes, ``("row", "col") * L`` reads L e bytes for each element, and a last "row" or
    "col" without its partner e more.

    Raises: as `sinkhorn_update_`.

    Source: as `sinkhorn_update_`, algorithm 3.
    """
    check_rule(rule)
    check_grads(grads)
    scales: tuple[list[Tensor], list[Tensor]] = implementation(__name__, backend, grads[:1]).sinkhorn_scales(
        grads, rule=rule, transform=transform
    )
    return scales


def rank1_apply_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    col_scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    row_offsets: Sequence[Tensor] | None = None,
    col_offsets: Sequence[Tensor] | None = None,
    sign: bool = False,
    conv: bool = False,
    transform: GradTransform = GradTransform(),
    rounding: Rounding = Rounding(),
    backend: str = "auto",
) -> None:
    """Update parameters by a gradient that is scaled by rows and columns, in place.

    ``p_ij -= lr (s_i t_j f(g_ij) + a_i + b_j + weight_decay p_ij)``

    Args:
        params: p, written.
        grads: read as ``transform`` says.
        row_scales, col_scales: s and t, float32, contiguous, of the shapes that `sinkhorn_scales` returns.
        steps: counters of updates, advanced by one; only the rounding noise depends on them.
        lr: step length, in units of the scaled gradient; a float or a 0-d tensor.
        weight_decay: decoupled, multiplied by lr.
        row_offsets, col_offsets: a and b, shaped as s and t; both or neither.
        sign: f is the sign instead of the identity.
        conv: as in `NormRule`.
        transform: scaling, clipping, sign and non-finite policy of the gradient; elements whose update would not be
            finite are kept, and counted.
        rounding: how bfloat16 results are rounded.
        backend: "auto", "triton" or "torch".

    Traffic: reads 2e and writes e bytes for each element: 6 bytes for bfloat16, 12 for float32.

    Raises: as `sinkhorn_update_`.
    """
    check_apply(params, grads, row_scales, col_scales, steps, row_offsets, col_offsets, conv)
    implementation(__name__, backend, (*params[:1], *grads[:1])).rank1_apply_(
        params, grads, row_scales, col_scales, steps,
        lr=lr, weight_decay=weight_decay, row_offsets=row_offsets, col_offsets=col_offsets, sign=sign, conv=conv,
        transform=transform, rounding=rounding,
    )  # fmt: skip
