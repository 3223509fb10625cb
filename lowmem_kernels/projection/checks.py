"""What the lists and options of the projection verbs have to satisfy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import SCALAR, check_gradients, check_list, check_params, check_pieces, state_dtypes
from ..numerics import PARAM_DTYPES
from ..pieces import RowPieces
from ..tensors import remembered
from .rule import (
    MIN_SIGNS,
    PROJ_TYPES,
    SCALE_TYPES,
    SOURCES,
    ApolloRule,
    Draw,
    channel_shape,
    moment_shape,
    norm_shape,
)

_FP32 = (torch.float32,)


def check_rank(rank: int, proj_type: str) -> None:
    """Raise ValueError unless a rank and what is contracted are allowed."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank is {rank!r}; allowed: an integer >= 1")
    _check_choice("proj_type", proj_type, PROJ_TYPES)


def check_draw(draw: Draw, rank: int) -> None:
    """Raise ValueError for a source, rank or epoch that is not allowed."""
    _check_choice("source", draw.source, SOURCES)
    if draw.source == "rademacher" and rank < MIN_SIGNS:
        raise ValueError(f"rank is {rank} and source is 'rademacher'; allowed: rank >= {MIN_SIGNS}")
    if isinstance(draw.epoch, Tensor):
        if draw.epoch.dtype is not torch.int64 or draw.epoch.ndim:
            raise ValueError(
                f"epoch is a {draw.epoch.dtype} tensor of {draw.epoch.ndim} dimensions; allowed: 0-d int64"
            )
    elif draw.epoch < 0:
        raise ValueError(f"epoch is {draw.epoch}; allowed: an integer >= 0")


def check_rule(rule: ApolloRule) -> None:
    """Raise ValueError, naming the field, its value and what is allowed, for a rule that makes no sense."""
    check_rank(rule.rank, rule.proj_type)
    _check_choice("scale_type", rule.scale_type, SCALE_TYPES)
    if not 0 <= rule.scale < math.inf:
        raise ValueError(f"scale is {rule.scale!r}; allowed: a finite number >= 0")
    if not 0 < rule.eps < math.inf:
        raise ValueError(f"eps is {rule.eps!r}; allowed: a finite number > 0")
    if len(rule.betas) != 2 or not all(0 <= beta < 1 for beta in rule.betas):
        raise ValueError(f"betas is {rule.betas!r}; allowed: 2 numbers >= 0 and < 1")
    if rule.growth_limit is not None and not 1 <= rule.growth_limit < math.inf:
        raise ValueError(f"growth_limit is {rule.growth_limit!r}; allowed: None or a finite number >= 1")


def check_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    norms: Sequence[Tensor],
    epochs: Sequence[Tensor],
    steps: Sequence[Tensor],
    rule: ApolloRule,
    draw: Draw,
    pieces: RowPieces | None,
) -> None:
    """Raise ValueError or TypeError where the arguments of `apollo_update_` do not fit together."""
    check_rule(rule)
    check_draw(draw, rule.rank)
    check_pieces(params, pieces)
    if pieces is not None and rule.conv:
        raise ValueError("rule.conv is True and there are pieces; allowed: pieces of matrices over the last dimensions")
    if not params:
        return
    rows = [None] * len(params) if pieces is None else pieces.rows

    def check_state() -> None:
        check_params(params, steps)
        device, shapes = params[0].device, [tuple(p.shape) for p in params]
        moments = [torch.Size(moment_shape(shape, rule, n)) for shape, n in zip(shapes, rows, strict=True)]
        check_list("exp_avgs", exp_avgs, moments, device, state_dtypes(params))
        check_list("exp_avg_sqs", exp_avg_sqs, moments, device, (exp_avgs[0].dtype,))
        check_list("norms", norms, [torch.Size(norm_shape(shape, rule)) for shape in shapes], device, _FP32)
        check_list("epochs", epochs, [SCALAR] * len(params), device, _FP32)

    check_gradients(params, grads)
    remembered([params, exp_avgs, exp_avg_sqs, norms, epochs, steps], ("check_apollo", rule, tuple(rows)), check_state)


def check_project(grads: Sequence[Tensor], rank: int, proj_type: str, draw: Draw) -> None:
    """Raise ValueError or TypeError where the arguments of `project` do not fit together."""
    check_rank(rank, proj_type)
    check_draw(draw, rank)
    if grads:
        check_list("grads", grads, [g.shape for g in grads], grads[0].device, PARAM_DTYPES, contiguous=False)


def check_apply(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    proj_type: str,
    conv: bool,
) -> None:
    """Raise ValueError or TypeError where the arguments of `channel_apply_` do not fit together."""
    _check_choice("proj_type", proj_type, PROJ_TYPES)
    if not params:
        return

    def check_state() -> None:
        check_params(params, steps)
        shapes = [torch.Size(channel_shape(tuple(p.shape), 1, proj_type, conv)) for p in params]
        check_list("scales", scales, shapes, params[0].device, _FP32)

    check_gradients(params, grads)
    remembered([params, scales, steps], ("check_channel_apply", proj_type, conv), check_state)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
