"""What can be fused, and what is refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from .base import LowMemOptimizer
from .checks import check_number
from .sharding import any_sharded

SCALER = (
    "a GradScaler unscales gradients in optimizer.step(), which comes after the update here; allowed: "
    "fuse_backward(..., loss_scale='dynamic') with handle.backward(loss), or bfloat16, which needs no scale"
)


def unwrapped(optimizer: Any) -> LowMemOptimizer:
    """Return the optimizer that a trainer has wrapped. Raises TypeError for what is none of this package."""
    while not isinstance(optimizer, LowMemOptimizer) and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        if getattr(optimizer, "scaler", None) is not None:
            raise TypeError(f"optimizer has a GradScaler; {SCALER}")
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, LowMemOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; allowed: an optimizer of lowmem_optim")
    return optimizer


def check_model(model: nn.Module, optimizer: LowMemOptimizer) -> None:
    """Raise ValueError or TypeError where a model's gradients cannot be used as they arrive."""
    if optimizer.fused is not None:
        raise ValueError("optimizer is fused already; allowed: one handle at a time, handle.remove() ends it")
    for name, module in model.named_modules():
        # by name: importing FSDP costs a second, and only who has imported it can have such modules
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise TypeError(
                f"{name or 'model'} is a FullyShardedDataParallel, which flattens parameters; allowed: fully_shard, "
                "DistributedDataParallel, or no wrapper"
            )
    params = set(model.parameters())
    missing = [member.identity for member in optimizer.members() if member.param not in params]
    if missing:
        raise ValueError(
            f"optimizer has {len(missing)} parameters that are none of the model's, {missing[0]!r} first; allowed: "
            "the model's, since optimizer.step() updates no parameter any more"
        )


def check_clip(clip_grad_norm: Any, clip_grad_value: Any, clip_param_norm: Any, groups: Iterable[Any]) -> None:
    """Raise ValueError for bounds that are not allowed, or not together."""
    bounds = {
        "clip_grad_norm": clip_grad_norm,
        "clip_grad_value": clip_grad_value,
        "clip_param_norm": clip_param_norm,
    }
    for name, bound in bounds.items():
        if bound is not None and not (name == "clip_grad_norm" and bound == math.inf):
            check_number(name, bound, positive=True)
    bounds_all = clip_grad_norm is not None or any(group.get("clip_grad_norm") is not None for group in groups)
    if clip_param_norm is not None and bounds_all:
        raise ValueError(f"clip_param_norm is {clip_param_norm!r} and there is a clip_grad_norm; allowed: one of them")


def check_pieces(optimizer: LowMemOptimizer, bounds: Mapping[str, Any]) -> None:
    """Raise ValueError for options that need a number of all gradients, where those are in pieces in several processes.

    ``bounds`` are the options of `fuse_backward`, by name.
    """
    if not any_sharded(member.param for member in optimizer.members()):
        return
    of_groups = [("clip_grad_norm", group.get("clip_grad_norm")) for group in optimizer.param_groups]
    for name, bound in [*bounds.items(), *of_groups]:
        if bound is not None:
            raise ValueError(
                f"{name} is {bound!r} and parameters are DTensors; allowed: None, or optimizer.step(), which clips by "
                "the norm of all processes"
            )


def check_loss_scale(loss_scale: Any) -> None:
    """Raise TypeError for a GradScaler and ValueError for what is neither None, a number > 0, nor "dynamic"."""
    if isinstance(loss_scale, GradScaler):
        raise TypeError(f"loss_scale is a GradScaler; {SCALER}")
    if isinstance(loss_scale, str) and loss_scale != "dynamic":
        raise ValueError(f"loss_scale is {loss_scale!r}; allowed: None, a number > 0, 'dynamic'")
    if loss_scale is not None and not isinstance(loss_scale, str):
        check_number("loss_scale", loss_scale, positive=True)


def check_alone() -> None:
    """Raise RuntimeError where there are other processes, with which nothing would average gradients."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"there are {dist.get_world_size()} processes and nothing averages their gradients; allowed: a model in "
            "DistributedDataParallel, given as that to fuse_backward, or process_group=dist.group.WORLD; for a model "
            "of this process only, process_group=dist.new_group([rank])"
        )


def names_of(model: nn.Module) -> dict[Tensor, str]:
    """Return {parameter: its first name}."""
    return {param: name for name, param in reversed([*model.named_parameters()])}
