"""What the lists of the lowrank verb have to satisfy, and what they say about the form of the moments."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_gradients, check_list, check_params
from ..tensors import remembered
from .rule import MAX_RANK

TensorList = Sequence[Tensor]


class Form(NamedTuple):
    """momentum: "none", "full" or "lowrank". second: "element", "rows", "cols" or "factored"."""

    momentum: str
    second: str

    @property
    def by_matrix(self) -> bool:
        """Whether the last two dimensions of each parameter are matrices by themselves."""
        return self.momentum == "lowrank" or self.second in ("cols", "factored")


def form_of(
    exp_avgs: TensorList | None,
    lefts: TensorList | None,
    rights: TensorList | None,
    exp_avg_sqs: TensorList | None,
    row_sqs: TensorList | None,
    col_sqs: TensorList | None,
) -> Form:
    """Return which moments there are. Raises ValueError for lists that do not go together."""
    if (lefts is None) != (rights is None):
        raise ValueError("one of lefts and rights is None; allowed: both lists, or neither")
    if exp_avgs is not None and lefts is not None:
        raise ValueError("exp_avgs is a list, and so is lefts; allowed: one momentum or none")
    if (exp_avg_sqs is None) == (row_sqs is None and col_sqs is None):
        raise ValueError("allowed second moments: exp_avg_sqs alone, row_sqs, col_sqs, or both row_sqs and col_sqs")
    momentum = "full" if exp_avgs is not None else "none" if lefts is None else "lowrank"
    if exp_avg_sqs is not None:
        return Form(momentum, "element")
    return Form(
        momentum, "factored" if row_sqs is not None and col_sqs is not None else "rows" if col_sqs is None else "cols"
    )


def check_lists(
    params: TensorList, grads: TensorList, steps: TensorList, form: Form, **states: TensorList | None
) -> None:
    """Raise ValueError or TypeError, naming the argument, the value and what is allowed, when the lists do not fit."""
    if not params:
        return

    def check_states() -> None:
        check_params(params, steps)
        _check_states(params, form, states)

    check_gradients(params, grads)
    remembered([params, steps, *states.values()], "check_lists", check_states)


def matrix_shape(shape: Sequence[int], by_matrix: bool) -> tuple[int, int, int]:
    """Return (E, m, n): a parameter as E matrices of its last two dimensions, or as one whose columns are the last."""
    if len(shape) < 2:
        return 1, 1, prod(shape)
    if by_matrix:
        return prod(shape[:-2]), shape[-2], shape[-1]
    return 1, prod(shape[:-1]), shape[-1]


def _check_states(params: TensorList, form: Form, states: dict[str, TensorList | None]) -> None:
    fp32 = (torch.float32,)
    device = params[0].device
    for name, tensors in states.items():
        _check_length(name, tensors, len(params))
    for name in ("exp_avgs", "exp_avg_sqs"):
        tensors = states[name]
        if tensors is not None:
            check_list(name, tensors, [p.shape for p in params], device, fp32)
    if form.by_matrix:
        for i, param in enumerate(params):
            if param.ndim < 2:
                raise ValueError(f"params[{i}] has shape {tuple(param.shape)}; allowed: two or more dimensions")
    lefts, rights = states["lefts"], states["rights"]
    if lefts is not None and rights is not None:
        ranks = [right.shape[-2] if right.ndim >= 2 else 0 for right in rights]
        for i, (param, rank) in enumerate(zip(params, ranks, strict=True)):
            if not 0 <= rank <= min(*param.shape[-2:], MAX_RANK):
                raise ValueError(
                    f"rights[{i}] has rank {rank}; allowed: at most {MAX_RANK}, and the sides of {tuple(param.shape)}"
                )
        shapes = [p.shape for p in params]
        check_list("lefts", lefts, [torch.Size((*s[:-1], r)) for s, r in zip(shapes, ranks, strict=True)], device, fp32)
        right_shapes = [torch.Size((*s[:-2], r, s[-1])) for s, r in zip(shapes, ranks, strict=True)]
        check_list("rights", rights, right_shapes, device, fp32)
    for name, last in (("row_sqs", False), ("col_sqs", True)):
        tensors = states[name]
        if tensors is None:
            continue
        check_list(name, tensors, [t.shape for t in tensors], device, fp32)
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            _check_groups(f"{name}[{i}]", tensor.numel(), param, form, last)


def _check_length(name: str, tensors: TensorList | None, count: int) -> None:
    """Raise unless a list has an entry for each parameter, and none of them is None."""
    if tensors is None:
        return
    if len(tensors) != count:
        raise ValueError(f"{name} has {len(tensors)} entries; allowed: {count}, one for each parameter")
    for i, tensor in enumerate(tensors):
        if tensor is None:
            raise ValueError(f"{name}[{i}] is None; allowed: a tensor, or None for the list")


def _check_groups(name: str, groups: int, param: Tensor, form: Form, cols: bool) -> None:
    stack, m, n = matrix_shape(param.shape, form.by_matrix)
    side = n if cols else m
    whole = stack * side
    wrong = groups == 0 if whole else groups not in (0, 1)
    if form.second == "factored":
        wrong = groups != whole
    elif whole and not wrong:
        wrong = groups % stack != 0 or side % (groups // stack) != 0
    if wrong:
        kind = "columns" if cols else "rows"
        exactly = f"{whole}, one for each" if form.second == "factored" else f"a divisor of {side} for each matrix"
        raise ValueError(f"{name} has {groups} elements for {whole} {kind} of {tuple(param.shape)}; allowed: {exactly}")
