"""How the norm of all gradients becomes part of how each of them is read, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_kernels import GradTransform
from lowmem_kernels.elementwise import grad_stats

from .buckets import Bucket
from .sharding import any_sharded, is_first_copy, is_sharded, local_of, process_group


def stats_of_all(
    groups: list[dict[str, Any]], buckets: list[Bucket], found_inf: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(`grad_stats` over all buckets on the first one's device, if an option of any group needs it, and found_inf).

    Where parameters are DTensors both are over all processes, so that all do the same.
    """
    if found_inf is None and not any(map(_needs_stats, groups)):
        return None, None
    params = [param for group in groups for param in group["params"]]
    if any_sharded(params):
        return _stats_of_processes(groups, params, buckets, found_inf)
    if not any(_needs_stats(bucket.group) for bucket in buckets):
        return None, found_inf
    stats = [grad_stats(bucket.grads, backend=bucket.group["backend"]) for bucket in buckets]
    return torch.stack([s.to(stats[0].device, non_blocking=True) for s in stats]).sum(0), found_inf


def _needs_stats(group: Mapping[str, Any]) -> bool:
    return group["skip_nonfinite"] == "step" or group.get("clip_grad_norm") is not None


def _stats_of_processes(
    groups: list[dict[str, Any]], params: list[Any], buckets: list[Bucket], found_inf: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """As `stats_of_all`. One all-reduce of 16 bytes where all meshes are of all processes, or none; nothing waits.

    Its vector is [sum of squares, number of NaN and Inf, whether any process has one, whether any has found_inf]; of
    copies, the first counts in the sums. Which collectives there are depends on parameters and options only, not on
    what has a gradient here.
    """
    needed = any(map(_needs_stats, groups))
    device = local_of(params[0]).device
    meshes = dict.fromkeys(param.device_mesh for param in params if is_sharded(param))
    parts: dict[Any, list[Tensor]] = {None: []}
    # the smallest first: what one has found goes along to the next
    for mesh in sorted(meshes, key=lambda mesh: mesh.size()):
        parts.setdefault(process_group(mesh), [])
    for bucket in buckets if needed else ():
        squares, count = grad_stats(bucket.grads, backend=bucket.group["backend"]).to(device, non_blocking=True)
        whole: Any = bucket.wholes[0] if bucket.wholes else None
        nothing = torch.zeros_like(count)
        vector = torch.stack(
            [squares, count, count, nothing]
            if whole is None or is_first_copy(whole)
            else [nothing, nothing, count, nothing]
        )
        parts[None if whole is None else process_group(whole.device_mesh)].append(vector)
    sums = torch.zeros(2, device=device)
    flags = torch.zeros(2, device=device)
    if found_inf is not None:
        flags[1] = local_of(found_inf).to(device, torch.float32, non_blocking=True).squeeze()
    for over, vectors in parts.items():
        vector = torch.cat([torch.zeros_like(sums), flags])
        for part in vectors:
            vector += part
        if over is not None:
            dist.all_reduce(vector, group=over)
        sums, flags = sums + vector[:2], vector[2:].clamp(max=1)
    sums[1] = torch.maximum(sums[1], flags[0])
    return sums if needed else None, None if found_inf is None else flags[1]


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
