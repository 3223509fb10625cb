"""What the lists and options of the factored verbs have to satisfy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import SCALAR, check_gradients, check_list, check_params, check_pieces, state_dtypes
from ..pieces import RowPieces
from ..tensors import remembered
from .rule import LR_SCHEDULES, FactoredRule

_FP32 = (torch.float32,)


def check_factored(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None,
    param_sums: Sequence[Tensor] | None,
    rule: FactoredRule,
    pieces: RowPieces | None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, the value and what is allowed, where these do not fit."""
    if rule.lr_schedule not in LR_SCHEDULES:
        allowed = ", ".join(map(repr, LR_SCHEDULES))
        raise ValueError(f"rule.lr_schedule is {rule.lr_schedule!r}; allowed: {allowed}")
    if (exp_avgs is None) != (rule.beta1 is None):
        given = "None" if exp_avgs is None else "given"
        raise ValueError(f"exp_avgs is {given} and rule.beta1 is {rule.beta1}; allowed: both or neither")
    if pieces is not None and rule.eps_floor:
        raise ValueError("rule.eps_floor is True and there are pieces; allowed: one of them")
    if not params:
        return

    def check_state() -> None:
        check_params(params, steps)
        check_pieces(params, pieces)
        _check_factors(params, rows, cols)
        if exp_avgs is not None:
            check_list("exp_avgs", exp_avgs, [p.shape for p in params], params[0].device, state_dtypes(params))
        if param_sums is not None:
            check_list("param_sums", param_sums, [SCALAR] * len(params), params[0].device, _FP32)

    check_gradients(params, grads)
    remembered([params, rows, cols, steps, exp_avgs, param_sums], ("check_factored", pieces), check_state)


def check_confidence(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    res_rows: Sequence[Tensor | None],
    res_cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    pieces: RowPieces | None,
) -> None:
    """Raise as `check_factored`."""
    if not params:
        return

    def check_state() -> None:
        check_params(params, steps)
        check_pieces(params, pieces)
        check_list("exp_avgs", exp_avgs, [p.shape for p in params], params[0].device, state_dtypes(params))
        _check_factors(params, rows, cols)
        device = params[0].device
        res_row_shapes = [row_shape(p) if p.ndim >= 2 else None for p in params]
        check_list("res_rows", res_rows, res_row_shapes, device, _FP32)
        check_list("res_cols", res_cols, [col_shape(p) for p in params], device, _FP32)

    check_gradients(params, grads)
    remembered([params, exp_avgs, rows, cols, res_rows, res_cols, steps], ("check_confidence", pieces), check_state)


def _check_factors(params: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor | None]) -> None:
    check_list("rows", rows, [row_shape(p) for p in params], params[0].device, _FP32)
    check_list("cols", cols, [col_shape(p) for p in params], params[0].device, _FP32)


def row_shape(param: Tensor) -> torch.Size:
    """Shape of the row factor, or of the whole second moment below two dimensions."""
    return param.shape[:-1] if param.ndim >= 2 else param.shape


def col_shape(param: Tensor) -> torch.Size | None:
    """Shape of the column factor; None below two dimensions, where there is none."""
    return param.shape[:-2] + param.shape[-1:] if param.ndim >= 2 else None
