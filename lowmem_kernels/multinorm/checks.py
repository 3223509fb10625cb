"""What the lists and options of the multi-normalization verbs have to satisfy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_gradients, check_list, check_params, check_pieces, state_dtypes
from ..numerics import PARAM_DTYPES
from ..pieces import RowPieces
from ..tensors import remembered
from .rule import NORMS, NormRule, steps_of

_FP32 = (torch.float32,)


def check_rule(rule: NormRule) -> None:
    """Raise ValueError, naming the field, its value and what is allowed, for a rule that makes no sense."""
    norms = rule.norms
    if not isinstance(norms, tuple) or not norms or not set(norms) <= {*NORMS}:
        raise ValueError(f"norms is {norms!r}; allowed: a tuple of at least one of {', '.join(map(repr, NORMS))}")
    if rule.eps is not None:
        if not 0 < rule.eps < math.inf:
            raise ValueError(f"eps is {rule.eps!r}; allowed: None or a finite number > 0")
        if steps_of(norms).half != norms:
            raise ValueError(f"eps is {rule.eps!r} and norms is {norms!r}; allowed with eps: 'row' and 'col' in turns")
    if not 0 <= rule.row_threshold < math.inf:
        raise ValueError(f"row_threshold is {rule.row_threshold!r}; allowed: a finite number >= 0")
    if rule.row_threshold and "sign" in norms:
        raise ValueError(f"row_threshold is {rule.row_threshold!r} and norms has 'sign'; allowed: one of them")
    if not 0 <= rule.momentum < 1:
        raise ValueError(f"momentum is {rule.momentum!r}; allowed: a number >= 0 and < 1")
    if rule.momentum == 0 and (rule.nesterov or rule.momentum_after):
        which = "nesterov" if rule.nesterov else "momentum_after"
        raise ValueError(f"{which} is True and momentum is 0; allowed: False, or a momentum > 0")


def check_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    rule: NormRule,
    exp_avgs: Sequence[Tensor] | None,
    pieces: RowPieces | None,
) -> None:
    """Raise ValueError or TypeError where the arguments of `sinkhorn_update_` do not fit together."""
    check_rule(rule)
    if (exp_avgs is None) != (rule.momentum == 0):
        given = "None" if exp_avgs is None else "given"
        raise ValueError(f"exp_avgs is {given} and rule.momentum is {rule.momentum}; allowed: both or neither")
    if not params:
        return

    def check_state() -> None:
        check_params(params, steps)
        check_pieces(params, pieces)
        for i, param in enumerate(params if pieces is not None and rule.conv else ()):
            if param.ndim > 2:
                raise ValueError(
                    f"params[{i}] has {param.ndim} dimensions and rule.conv is True; allowed with pieces: 2"
                )
        if exp_avgs is not None:
            check_list("exp_avgs", exp_avgs, [p.shape for p in params], params[0].device, state_dtypes(params))

    check_gradients(params, grads)
    remembered([params, steps, exp_avgs], ("check_multinorm", rule.conv, pieces), check_state)


def check_apply(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    col_scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    row_offsets: Sequence[Tensor] | None,
    col_offsets: Sequence[Tensor] | None,
    conv: bool,
) -> None:
    """Raise ValueError or TypeError where the arguments of `rank1_apply_` do not fit together."""
    if (row_offsets is None) != (col_offsets is None):
        given = "row_offsets" if col_offsets is None else "col_offsets"
        raise ValueError(f"only {given} is given; allowed: both offsets or neither")
    if not params:
        return

    def check_state() -> None:
        check_params(params, steps)
        device = params[0].device
        rows, cols = ([shape[i] for shape in (vector_shapes(p, conv) for p in params)] for i in (0, 1))
        check_list("row_scales", row_scales, rows, device, _FP32)
        check_list("col_scales", col_scales, cols, device, _FP32)
        if row_offsets is not None and col_offsets is not None:
            check_list("row_offsets", row_offsets, rows, device, _FP32)
            check_list("col_offsets", col_offsets, cols, device, _FP32)

    check_gradients(params, grads)
    remembered([params, row_scales, col_scales, steps, row_offsets, col_offsets], ("check_apply", conv), check_state)


def check_grads(grads: Sequence[Tensor]) -> None:
    """Raise ValueError or TypeError unless all gradients are on one device and of one dtype."""
    if grads:
        check_list("grads", grads, [g.shape for g in grads], grads[0].device, PARAM_DTYPES, contiguous=False)


def vector_shapes(param: Tensor, conv: bool) -> tuple[torch.Size, torch.Size]:
    """Shapes of the vectors that belong to a parameter's rows and to its columns."""
    shape = param.shape
    if len(shape) < 2:
        return torch.Size((1,)), torch.Size((param.numel(),))
    if conv:
        return shape[:1], torch.Size((math.prod(shape[1:]),))
    return shape[:-1], shape[:-2] + shape[-1:]
