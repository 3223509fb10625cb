"""How the norm of all gradients becomes part of how each of them is read, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowmem_kernels import GradTransform
from lowmem_kernels.elementwise import grad_stats

from .buckets import Bucket


def stats_of_all(buckets: list[Bucket]) -> Tensor | None:
    """`grad_stats` over all buckets on the first one's device, if an option of any of them needs it."""
    if not any(b.group["skip_nonfinite"] == "step" or b.group.get("clip_grad_norm") is not None for b in buckets):
        return None
    stats = [grad_stats(bucket.grads, backend=bucket.group["backend"]) for bucket in buckets]
    return torch.stack([s.to(stats[0].device, non_blocking=True) for s in stats]).sum(0)


def with_stats(
    transform: GradTransform, group: Mapping[str, Any], max_norm: float | None, stats: Tensor
) -> GradTransform:
    """Add the global clip coefficient, and skip the step where any gradient, and so the norm, is not finite."""
    if max_norm is not None:
        norm = stats[0].sqrt() if transform.inv_scale is None else stats[0].sqrt() * transform.inv_scale
        transform = replace(transform, clip_coef=clip_coefficient(max_norm, norm))
    if group["skip_nonfinite"] is not False:
        nonfinite = (stats[1] > 0).float()
        found_inf = nonfinite if transform.found_inf is None else torch.maximum(transform.found_inf, nonfinite)
        transform = replace(transform, found_inf=found_inf)
    return transform


def clip_coefficient(max_norm: float, norm: Tensor) -> Tensor:
    """Return what brings a norm down to ``max_norm``, as torch.nn.utils.clip_grad_norm_ does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def on_device(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.to(device, torch.float32, non_blocking=True)
