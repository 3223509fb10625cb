"""What the lists of the elementwise verbs have to satisfy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import PARAM_DTYPES, name_of


def check_lists(
    params: Sequence[Tensor], grads: Sequence[Tensor], steps: Sequence[Tensor] | None = None, **states: Sequence[Tensor]
) -> None:
    """Raise ValueError or TypeError, naming the argument, the value and what is allowed, when the lists do not fit."""
    if not params:
        return
    _check_list("params", params, params, PARAM_DTYPES)
    _check_list("grads", grads, params, PARAM_DTYPES)
    if steps is not None:
        _check_list("steps", steps, params, (torch.float32,), scalars=True)
    # float16 is not allowed: squares of gradients below 2e-4 would be 0
    bf16 = params[0].dtype is torch.bfloat16
    for name, tensors in states.items():
        _check_list(name, tensors, params, (torch.float32, torch.bfloat16) if bf16 else (torch.float32,))
        if not all([t.is_contiguous() for t in tensors]):
            raise ValueError(f"{name} has a tensor that is not contiguous; allowed: contiguous tensors")
    if len({tensors[0].dtype for tensors in states.values()}) > 1:
        found = ", ".join(f"{name} {name_of(tensors[0].dtype)}" for name, tensors in states.items())
        raise TypeError(f"states are {found}; allowed: one dtype for all of them")


def _check_list(
    name: str,
    tensors: Sequence[Tensor],
    params: Sequence[Tensor],
    allowed: Sequence[torch.dtype],
    scalars: bool = False,
) -> None:
    if len(tensors) != len(params):
        raise ValueError(f"{name} has {len(tensors)} tensors; allowed: {len(params)}, one for each parameter")
    # once for the whole list first: this runs in every step, and there is something to look for only if it fails
    dtypes, shapes = {t.dtype for t in tensors}, [t.shape for t in tensors]
    expected_shapes = [torch.Size()] * len(params) if scalars else [p.shape for p in params]
    device = params[0].device
    if (
        len(dtypes) == 1
        and dtypes <= {*allowed}
        and shapes == expected_shapes
        and {t.device for t in tensors} == {device}
    ):
        return
    first = tensors[0].dtype
    for i, (tensor, shape) in enumerate(zip(tensors, expected_shapes, strict=True)):
        if tensor.dtype not in allowed:
            raise TypeError(f"{name}[{i}] is {name_of(tensor.dtype)}; allowed: {', '.join(map(name_of, allowed))}")
        if tensor.dtype is not first:
            raise TypeError(f"{name}[{i}] is {name_of(tensor.dtype)}; allowed: {name_of(first)}, as {name}[0]")
        if tensor.device != device:
            raise ValueError(f"{name}[{i}] is on {tensor.device}; allowed: {device}, as params[0]")
        if tensor.shape != shape:
            raise ValueError(f"{name}[{i}] has shape {tuple(tensor.shape)}; allowed: {tuple(shape)}")
