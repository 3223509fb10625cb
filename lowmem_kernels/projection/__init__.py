"""Random projections of gradients, and APOLLO, which learns from them how far each channel of a matrix should move.

A parameter of two or more dimensions is a stack of matrices m x n over its last two, or with ``conv`` one matrix whose
columns are all dimensions but the first; one of fewer dimensions is a single row. The shorter dimension is contracted
(of square matrices the columns) unless ``proj_type`` says otherwise; an element of the other is a *channel*. With G_c a
channel and P a random r x k matrix, whose entries have the variance 1 / r,

    R_c = P G_c,  M += (1 - beta1)(R - M),  V += (1 - beta2)(R² - V),  R~ = M / (sqrt(V) + eps)
    s_c = |R~_c| / (|R_c| + 1e-8),  or  s = |R~| / (|R| + 1e-8) for all channels of a matrix
    X_c = s_c G_c,  limited so that |X| grows by at most ``growth_limit`` from step to step
    p -= lr sqrt(scale) sqrt(1 - beta2^t) / (1 - beta1^t) X,  then  p -= lr weight_decay p

Nothing of the size of G is made: ``|X|² = sum_c s_c² |G_c|²``, so that the projections and the channels' sums of
squares, both of one read, say all that the second read needs. Where the contracted dimension has no more elements than
the rank, R is G itself: moments then take as much as Adam's, and never more.

P is never stored with a model. It is drawn by a counter-based generator from a seed, an epoch and an entry's position,
and redrawn when the epoch grows; moments stay as they are then.

Every verb takes lists with one entry for each parameter, on one device. Parameters have one dtype, gradients have one:
float32, bfloat16 or float16, any shape and strides, empty ones included. ``steps`` are 0-d float32 counters, read as
t - 1 and written as t. Arithmetic is fp32, each result is rounded once, and sums are taken in an order that depends on
a parameter's shape and, on a GPU, layout in memory: the same bits on every run, whatever else is in the lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import implementation
from ..options import GradTransform, Rounding
from ..pieces import RowPieces
from .checks import check_apply, check_draw, check_project, check_rank, check_update
from .rule import ApolloRule, Draw

__all__ = [
    "ApolloRule",
    "Draw",
    "apollo_update_",
    "channel_apply_",
    "project",
    "projection_matrix",
]


def apollo_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    norms: Sequence[Tensor],
    epochs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    rule: ApolloRule,
    draw: Draw,
    pieces: RowPieces | None = None,
    transform: GradTransform = GradTransform(),
    rounding: Rounding = Rounding(),
    backend: str = "auto",
) -> None:
    """Update parameters by APOLLO, in place, as in the module's docstring.

    A parameter with a sum of squares that is NaN or Inf keeps its value, its state and its step if
    ``transform.skip_nonfinite``, and ``transform.skipped`` counts it as one.

    Args:
        params: p, written.
        grads: G, read as ``transform`` says.
        exp_avgs, exp_avg_sqs: M and V, float32 or the parameters' bfloat16, contiguous, of `moment_shape`; written.
        norms: float32, of `norm_shape`: the norm |X| of each matrix's last update before lr, 0 before the first;
            written. One below 1e-6, or that is not finite, limits nothing, so that a gradient of zeros does not stop
            training.
        epochs: 0-d float32: which projection the last update used; written.
        steps: counters of updates, advanced by one.
        lr: step length, in units of Adam's; a float or a 0-d tensor.
        weight_decay: decoupled, multiplied by lr, of what the update has left.
        rule: rank, scaling, moments and limit.
        draw: which projections. ``source="torch"`` waits for the device where the epoch lies there.
        pieces: says which rows of its matrices each process has, see `RowPieces`; None: all. Sides, ranks and
            projections are those of the whole. M and V have the rows that are here where columns are contracted or
            nothing is projected, and are whole, and equal in all processes, where rows are contracted; norms, epochs
            and steps are equal. A single sum is taken, for each matrix of: 2 numbers ("tensor": 3) where columns are
            contracted; rank + 1 for each channel where rows are; 3 for each channel ("tensor": 3 in all) where they
            are not projected. With Triton these are two sums: of each parameter's squares and what rows that are
            contracted leave, then of what moments leave. Not with ``rule.conv``.
        transform: scaling, clipping, sign and non-finite policy of the gradient.
        rounding: how bfloat16 results are rounded; p is stream 0, M stream 1, V stream 2.
        backend: "auto", "triton" or "torch".

    Traffic: with elements of e bytes, reads 3e and writes e for each element: 8 bytes for bfloat16. Moments and R,
    which is fp32, take 24 r bytes for each channel, and beyond rank 256 G is read once more for each 256.

    Raises:
        ValueError, TypeError: lists or options that do not fit together, before anything is written.
        RuntimeError: backend="triton" where it cannot run.

    Source: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance" (arXiv 2412.05270), algorithm 1 and
    equations 3 to 9.
    """
    check_update(params, grads, exp_avgs, exp_avg_sqs, norms, epochs, steps, rule, draw, pieces)
    implementation(__name__, backend, (*params[:1], *grads[:1])).apollo_update_(
        params, grads, exp_avgs, exp_avg_sqs, norms, epochs, steps,
        lr=lr, weight_decay=weight_decay, rule=rule, draw=draw, pieces=pieces, transform=transform, rounding=rounding,
    )  # fmt: skip


def project(
    grads: Sequence[Tensor],
    *,
    rank: int,
    draw: Draw,
    proj_type: str = "std",
    conv: bool = False,
    transform: GradTransform = GradTransform(),
    backend: str = "auto",
) -> tuple[list[Tensor], list[Tensor]]:
    """Return R and the channels' sums of squares, float32, of each gradient.

    Args:
        grads: read as ``transform`` says.
        rank: r.
        draw: which projections.
        proj_type, conv: as in `ApolloRule`.
        transform: scaling, clipping and sign of the gradient; found_inf and skip_nonfinite do not count.
        backend: "auto", "triton" or "torch".

    Returns R of shape [..., m, r] where columns are contracted, [..., r, n] where rows are, and of G's where nothing
    is; and sums of shape [..., channels].

    Traffic: reads e bytes for each element (once for each 256 ranks), writes 4 r + 4 for each channel.

    Raises, Source: as `apollo_update_`.
    """
    check_project(grads, rank, proj_type, draw)
    found: tuple[list[Tensor], list[Tensor]] = implementation(__name__, backend, grads[:1]).project(
        grads, rank=rank, proj_type=proj_type, conv=conv, draw=draw, transform=transform
    )
    return found


def projection_matrix(
    shape: Sequence[int],
    *,
    rank: int,
    draw: Draw,
    proj_type: str = "std",
    conv: bool = False,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Return P, float32 [r, contracted elements], by which a gradient of this shape is multiplied.

    It is exactly what the kernels multiply with, and has the same bits on every device but with the source "torch",
    whose generators differ. The identity where the gradient stands for its own projection.

    Args:
        shape: of the whole parameter.
        rank, proj_type, conv: as in `project`.
        draw: with one uid, or None for 0.
        device: where it is drawn, and lies.
        backend: "auto", "triton" or "torch".

    Raises: as `apollo_update_`.
    """
    check_rank(rank, proj_type)
    check_draw(draw, rank)
    matrix: Tensor = implementation(__name__, backend, (torch.empty(0, device=device),)).projection_matrix(
        shape, rank=rank, draw=draw, proj_type=proj_type, conv=conv, device=device
    )
    return matrix


def channel_apply_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    proj_type: str = "std",
    conv: bool = False,
    transform: GradTransform = GradTransform(),
    rounding: Rounding = Rounding(),
    backend: str = "auto",
) -> None:
    """Update parameters by a gradient whose channels are scaled, in place: ``p -= lr s_c g``, then ``p -= lr wd p``.

    Args:
        params: p, written.
        grads: read as ``transform`` says.
        scales: s, float32, contiguous, [..., channels].
        steps: counters of updates, advanced by one; only the rounding noise depends on them.
        lr: step length, in units of the scaled gradient; a float or a 0-d tensor.
        weight_decay: decoupled, multiplied by lr.
        proj_type, conv: say what channels are, as in `ApolloRule`.
        transform: scaling, clipping, sign and non-finite policy of the gradient; elements whose update would not be
            finite are kept, and counted.
        rounding: how bfloat16 results are rounded.
        backend: "auto", "triton" or "torch".

    Traffic: reads 2e and writes e bytes for each element: 6 bytes for bfloat16.

    Raises: as `apollo_update_`.
    """
    check_apply(params, grads, scales, steps, proj_type, conv)
    implementation(__name__, backend, (*params[:1], *grads[:1])).channel_apply_(
        params, grads, scales, steps,
        lr=lr, weight_decay=weight_decay, proj_type=proj_type, conv=conv, transform=transform, rounding=rounding,
    )  # fmt: skip
