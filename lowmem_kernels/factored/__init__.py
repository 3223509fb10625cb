"""Factored second moments over many tensors: Adafactor in its dialects, AdaLomo, and CAME.

A parameter of two or more dimensions is a stack of E matrices, n x m, over its last two; its second moment is kept as a
row factor R of shape [..., n] and a column factor C of shape [..., m]. One of fewer dimensions keeps it in full. With
``q = g² + eps1``, w the weight of the new value (``1 - beta2``), and t from 1:

    R += w (mean_j q - R),  C += w (mean_i q - C),  V_ij = R_i C_j / mean(R)        or  V += w (q - V)
    u = g / sqrt(V),  RMS over the whole parameter,  u /= max(1, RMS(u) / d)
    rate_t = rate(t) * max(eps2, RMS(p)),  p -= rate_t u + decay p

Every verb takes lists with one entry for each parameter, on one device. Parameters have one dtype, gradients have one:
float32, bfloat16 or float16, any shape and strides, empty ones included. ``rows[i]`` is R and ``cols[i]`` is C; for a
parameter of fewer than two dimensions ``rows[i]`` is V, of its shape, and ``cols[i]`` is None. All second moments are
float32 and contiguous. ``steps`` are 0-d float32 counters, read as t - 1 and written as t.

A parameter whose sums are NaN or Inf keeps its value, its state and its step if ``transform.skip_nonfinite``, and
``transform.skipped`` counts it as one. Arithmetic is fp32, each result is rounded once, and sums are taken in an order
that depends on a parameter's shape and, on a GPU, layout in memory: the same bits on every run, whatever else is in the
lists.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import implementation
from ..options import GradTransform, Rounding
from ..pieces import RowPieces
from .checks import check_confidence, check_factored
from .rule import FactoredRule

__all__ = ["FactoredRule", "confidence_update_", "factored_update_"]


def factored_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    rule: FactoredRule,
    exp_avgs: Sequence[Tensor] | None = None,
    param_sums: Sequence[Tensor] | None = None,
    pieces: RowPieces | None = None,
    transform: GradTransform = GradTransform(),
    rounding: Rounding = Rounding(),
    backend: str = "auto",
) -> None:
    """Update parameters by Adafactor, in place, in the dialect of ``rule``.

    As in the module's docstring; with momentum ``m += (1 - beta1)(rate_t u - m)``, before it is rounded, takes the
    place of rate_t u.

    Args:
        params: p, written.
        grads: read as ``transform`` says.
        rows, cols: second moments, written.
        steps: counters of updates, advanced by one.
        lr: step length; in units of the update's RMS, or of RMS(p) where ``rule.scale_parameter``; a float or a 0-d
            tensor.
        weight_decay: decoupled, multiplied by the rate that ``rule.scale_decay`` says.
        rule: the dialect.
        exp_avgs: m, of the parameters' shapes, float32 or the parameters' bfloat16, contiguous, written; given if and
            only if ``rule.beta1`` is.
        param_sums: 0-d float32 tensors holding the sum of p² that the last call left, or NaN where p may have changed
            since; written where ``rule.scale_parameter``. With it p need not be read for RMS(p). None: it always is.
        pieces: how rows are spread over processes, None where they are all here; for parameters of two or more
            dimensions and a rule without ``eps_floor``. One sum of 2 m + 1 numbers for each matrix and at most 2
            for each parameter. ``param_sums`` are those of the rows that are here.
        transform: scaling, clipping, sign and non-finite policy of the gradient.
        rounding: how bfloat16 results are rounded; p is stream 0, m stream 1.
        backend: "auto", "triton" or "torch".

    Traffic: see README.md beside this file.

    Raises:
        ValueError, TypeError: lists or options that do not fit together, before anything is written.
        RuntimeError: backend="triton" where it cannot run.

    Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (arXiv 1804.04235),
    algorithms 4 and 5; Lv et al., "AdaLomo: Low-memory Optimization with Adaptive Learning Rate" (arXiv 2310.10195).
    """
    check_factored(params, grads, rows, cols, steps, exp_avgs, param_sums, rule, pieces)
    implementation(__name__, backend, (*params[:1], *grads[:1])).factored_update_(
        params, grads, rows, cols, steps,
        lr=lr, weight_decay=weight_decay, rule=rule, exp_avgs=exp_avgs, param_sums=param_sums,
        pieces=pieces, transform=transform, rounding=rounding,
    )  # fmt: skip


def confidence_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    res_rows: Sequence[Tensor | None],
    res_cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float, float],
    eps: tuple[float, float],
    clip_threshold: float,
    weight_decay: float,
    pieces: RowPieces | None = None,
    transform: GradTransform = GradTransform(),
    rounding: Rounding = Rounding(),
    backend: str = "auto",
) -> None:
    """Update parameters by CAME, in place: a momentum of clipped updates, divided by its factored instability.

    With u as in the module's docstring, after clipping, with constant beta2, and w3 = 1 - beta3:

        m += (1 - beta1)(u - m),  s = (u - m)² + eps2
        Rs += w3 (mean_j s - Rs),  Cs += w3 (mean_i s - Cs),  S_ij = Rs_i Cs_j / mean(Rs)
        p -= lr m / sqrt(S) + lr weight_decay p

    A parameter of fewer than two dimensions has no S: ``p -= lr m + lr weight_decay p``. Where m is bfloat16, s is made
    of it as it is before rounding, and p moves by it as it is stored.

    Args:
        params: p, written.
        grads: read as ``transform`` says.
        exp_avgs: m, of the parameters' shapes, float32 or the parameters' bfloat16, contiguous, written.
        rows, cols: second moments of the gradient, written.
        res_rows, res_cols: Rs and Cs, float32, shaped as rows and cols, both None where cols is; written.
        steps: counters of updates, advanced by one.
        lr: step length, in units of the update's RMS (which CAME does not bound: 11 in the first step); a float or a
            0-d tensor.
        betas: (beta1, beta2, beta3) in [0, 1).
        eps: (eps1, eps2), in units of the squared gradient and of the squared update.
        clip_threshold: d.
        weight_decay: decoupled, multiplied by lr.
        pieces: as in `factored_update_`; a second sum has m + 1 numbers for each matrix.
        transform, rounding, backend: as in `factored_update_`.

    Traffic: see README.md beside this file.

    Raises: as `factored_update_`.

    Source: Luo et al., "CAME: Confidence-guided Adaptive Memory Efficient Optimization" (arXiv 2307.02047),
    algorithm 2.
    """
    check_confidence(params, grads, exp_avgs, rows, cols, res_rows, res_cols, steps, pieces)
    implementation(__name__, backend, (*params[:1], *grads[:1])).confidence_update_(
        params, grads, exp_avgs, rows, cols, res_rows, res_cols, steps,
        lr=lr, betas=betas, eps=eps, clip_threshold=clip_threshold, weight_decay=weight_decay,
        pieces=pieces, transform=transform, rounding=rounding,
    )  # fmt: skip
