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
    device = params[0].device
    _check_list("params", params, params)
    _check_list("grads", grads, params)
    if steps is not None:
        _check_length("steps", steps, params)
        for i, step in enumerate(steps):
            if step.dtype is not torch.float32 or step.ndim or step.device != device:
                raise TypeError(
                    f"steps[{i}] is {name_of(step.dtype)} of shape {tuple(step.shape)} on {step.device}; "
                    f"allowed: a 0-d float32 tensor on {device}"
                )
    for name, tensors in states.items():
        _check_length(name, tensors, params)
        dtype = tensors[0].dtype
        # float16 is not allowed: squares of gradients below 2e-4 would be 0
        if dtype is not torch.float32 and (dtype, params[0].dtype) != (torch.bfloat16, torch.bfloat16):
            raise TypeError(f"{name} is {name_of(dtype)}; allowed: float32, or bfloat16 where params are bfloat16")
        if dtype != next(iter(states.values()))[0].dtype:
            raise TypeError(f"{name} is {name_of(dtype)}; allowed: one dtype for {' and '.join(states)}")
        _check_list(name, tensors, params)
        for i, tensor in enumerate(tensors):
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{i}] has strides {tensor.stride()}; allowed: a contiguous tensor")


def _check_length(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(tensors) != len(params):
        raise ValueError(f"{name} has {len(tensors)} tensors; allowed: {len(params)}, one for each parameter")


def _check_list(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    _check_length(name, tensors, params)
    dtype, device = tensors[0].dtype, params[0].device
    if dtype not in PARAM_DTYPES:
        allowed = ", ".join(map(name_of, PARAM_DTYPES))
        raise TypeError(f"{name}[0] is {name_of(dtype)}; allowed: {allowed}")
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if tensor.dtype is not dtype:
            raise TypeError(f"{name}[{i}] is {name_of(tensor.dtype)}; allowed: {name_of(dtype)}, as {name}[0]")
        if tensor.device != device:
            raise ValueError(f"{name}[{i}] is on {tensor.device}; allowed: {device}, as params[0]")
        if tensor.shape != param.shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(tensor.shape)}; allowed: {tuple(param.shape)}, as params[{i}]"
            )
