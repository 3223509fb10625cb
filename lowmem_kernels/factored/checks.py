"""What the lists and options of the factored verbs have to satisfy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import SCALAR, check_list, check_params, state_dtypes
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
) -> None:
    """Raise ValueError or TypeError, naming the argument, the value and what is allowed, where these do not fit."""
    if rule.lr_schedule not in LR_SCHEDULES:
        allowed = ", ".join(map(repr, LR_SCHEDULES))
        raise ValueError(f"rule.lr_schedule is {rule.lr_schedule!r}; allowed: {allowed}")
    if (exp_avgs is None) != (rule.beta1 is None):
        given = "None" if exp_avgs is None else "given"
        raise ValueError(f"exp_avgs is {given} and rule.beta1 is {rule.beta1}; allowed: both or neither")
    if not params:
        return
    check_params(params, grads, steps)
    _check_moments("rows", rows, "cols", cols, params)
    if exp_avgs is not None:
        check_list("exp_avgs", exp_avgs, [p.shape for p in params], params[0].device, state_dtypes(params))
    if param_sums is not None:
        check_list("param_sums", param_sums, [SCALAR] * len(params), params[0].device, _FP32)


def check_confidence(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    res_rows: Sequence[Tensor | None],
    res_cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
) -> None:
    """Raise as `check_factored`."""
    if not params:
        return
    check_params(params, grads, steps)
    check_list("exp_avgs", exp_avgs, [p.shape for p in params], params[0].device, state_dtypes(params))
    _check_moments("rows", rows, "cols", cols, params)
    matrices = [p for p in params if p.ndim >= 2]
    for name, factors in (("res_rows", res_rows), ("res_cols", res_cols)):
        if len(factors) != len(params) or any(
            (f is None) != (p.ndim < 2) for f, p in zip(factors, params, strict=False)
        ):
            raise ValueError(
                f"{name} does not fit params; allowed: a tensor for each of 2 or more dimensions, else None"
            )
    _check_moments(
        "res_rows", [r for r in res_rows if r is not None], "res_cols", [c for c in res_cols if c is not None], matrices
    )


def _check_moments(
    row_name: str, rows: Sequence[Tensor], col_name: str, cols: Sequence[Tensor | None], params: Sequence[Tensor]
) -> None:
    device = params[0].device if params else torch.device("cpu")
    check_list(row_name, rows, [row_shape(p) for p in params], device, _FP32)
    if len(cols) != len(params):
        raise ValueError(f"{col_name} has {len(cols)} entries; allowed: {len(params)}, one for each parameter")
    for i, (col, param) in enumerate(zip(cols, params, strict=True)):
        if (col is None) != (param.ndim < 2):
            allowed = "None" if param.ndim < 2 else "a tensor"
            raise ValueError(
                f"{col_name}[{i}] is {'None' if col is None else 'a tensor'}; allowed: {allowed}, since "
                f"params[{i}] has shape {tuple(param.shape)}"
            )
    matrices = [(c, p) for c, p in zip(cols, params, strict=True) if c is not None]
    check_list(col_name, [c for c, _ in matrices], [col_shape(p) for _, p in matrices], device, _FP32)


def row_shape(param: Tensor) -> torch.Size:
    """Shape of the row factor, or of the whole second moment below two dimensions."""
    return param.shape[:-1] if param.ndim >= 2 else param.shape


def col_shape(param: Tensor) -> torch.Size:
    """Shape of the column factor of a parameter of two or more dimensions."""
    return param.shape[:-2] + param.shape[-1:]
