"""Loss scale, norms and clipping where gradients are used one after the other, without waiting for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowmem_kernels import GradTransform
from lowmem_kernels.elementwise import grad_stats

from .base import LowMemOptimizer
from .buckets import Bucket
from .clipping import clip_coefficient, on_device, with_stats

#: Keys of the optimizer's first group, so that checkpoints have it: decaying sums of norms and of their weights,
NORM = "fused_norm"
#: the loss scale and the backward passes since it changed.
LOSS_SCALE = "fused_loss_scale"

#: Of the running norm: ten passes count.
DECAY = 0.9

#: As torch.amp.GradScaler has them.
FIRST_SCALE, BACKOFF, GROWTH, GROWTH_INTERVAL = 2.0**16, 0.5, 2.0, 2000
SMALLEST_SCALE, LARGEST_SCALE = 1.0, 2.0**24


class Clipping:
    """What a backward pass knows of the size of gradients, and the GradTransforms that follow from it.

    ``clip_grad_norm`` bounds the norm of all gradients. Where it is exact, it has been taken in a backward pass before.
    Otherwise the larger of two numbers stands for it: the decaying mean of the norms of earlier passes, and the norm of
    the gradients that have arrived so far, the present ones included.
    """

    def __init__(
        self,
        optimizer: LowMemOptimizer,
        clip_grad_norm: float | None,
        clip_grad_value: float | None,
        clip_param_norm: float | None,
        loss_scale: float | str | None,
    ) -> None:
        self._optimizer = optimizer
        self._clip_grad_norm = clip_grad_norm
        self._clip_grad_value = clip_grad_value
        self._clip_param_norm = clip_param_norm
        self._loss_scale = loss_scale
        self._fixed_scale = None if loss_scale in (None, "dynamic") else torch.tensor(float(loss_scale))
        #: norm of the last pass, before clipping and of the unscaled loss, if it was needed
        self.norm: Tensor | None = None
        self.exact: Tensor | None = None
        # here rather than in the first pass: torch.distributed.checkpoint loads only what it finds in the groups
        if self._bounds_norm():
            self._kept(NORM, 0.0)
        if loss_scale == "dynamic":
            self._kept(LOSS_SCALE, FIRST_SCALE)

    @property
    def _device(self) -> torch.device:
        """Where numbers are kept: where the first parameter is."""
        return next(self._optimizer.members()).param.device

    @property
    def scales(self) -> bool:
        """Whether the loss has to be multiplied."""
        return self._loss_scale is not None

    def scale(self) -> Tensor | None:
        """Return the loss scale."""
        if self._loss_scale == "dynamic":
            return self._kept(LOSS_SCALE, FIRST_SCALE)[0]
        if self._fixed_scale is not None:
            self._fixed_scale = self._fixed_scale.to(self._device)
        return self._fixed_scale

    def begin(self, measuring: bool) -> None:
        """Start a pass, which only measures or is to update parameters."""
        scale = self.scale()
        self._inv_scale = None if scale is None else scale.reciprocal()
        self._measuring = measuring
        self._needed = measuring or self.exact is not None or self._loss_scale == "dynamic" or self._bounds_norm()
        if not self._needed:
            self.norm = None
            return
        # sums of squares, those that are not finite left out; NaN and Inf
        self._sums, self._all_sums = (torch.zeros(2, dtype=torch.float64, device=self._device) for _ in range(2))

    def measure(self, buckets: list[Bucket]) -> None:
        """Take the norm of gradients that are used together, and add it to that of this pass, if anything needs it."""
        if self._clip_param_norm is None and (not self._needed or (self.exact is not None and not self._measuring)):
            return
        device = self._device
        each = [grad_stats(b.grads, backend=b.group["backend"]).to(device, non_blocking=True) for b in buckets]
        self._own_sums = torch.stack(each).sum(0)
        if self._needed:
            self._all_sums += self._own_sums
            self._sums += torch.where(self._own_sums.isfinite(), self._own_sums, 0.0)

    def transform(self, bucket: Bucket) -> GradTransform:
        """Return how the gradients of a bucket are to be read."""
        group = bucket.group
        transform = self._optimizer.transform_of(bucket, self._inv_scale, None)
        if self._clip_grad_value is not None:
            transform = replace(transform, clip_value=self._clip_grad_value)
        if self.scales:
            transform = replace(transform, skip_nonfinite=True)
        bound = self._bound(group)
        if self.exact is not None:
            skips = {"skip_nonfinite": True if self.scales else group["skip_nonfinite"]}
            stats = self.exact.to(bucket.device, torch.float32, non_blocking=True)
            transform = with_stats(transform, skips, bound, stats)
        elif bound is not None:
            coefficient = clip_coefficient(bound, torch.maximum(self._running_norm(), self._norm(self._sums)))
            transform = replace(transform, clip_coef=on_device(bucket.device, coefficient))
        if self._clip_param_norm is not None:
            coefficient = clip_coefficient(self._clip_param_norm, self._norm(self._own_sums))
            transform = replace(transform, clip_coef=on_device(bucket.device, coefficient))
        return transform

    def end(self) -> None:
        """Finish a pass: keep its norm, and adapt the loss scale."""
        if self._measuring:
            self.exact = self._all_sums
            self._optimizer.count_nonfinite(self.exact)
            return
        if not self._needed:
            return
        sums = self._sums if self.exact is None else self.exact
        self.norm = self._norm(sums)
        finite = (sums[1] == 0) & self.norm.isfinite()
        if self._bounds_norm():
            kept = self._kept(NORM, 0.0)
            new = torch.stack([self.norm, torch.ones_like(self.norm)])
            kept.copy_(torch.where(finite, DECAY * kept + (1 - DECAY) * new, kept))
        if self._loss_scale == "dynamic":
            _adapt(self._kept(LOSS_SCALE, FIRST_SCALE), finite)

    def _bounds_norm(self) -> bool:
        return any(self._bound(group) is not None for group in self._optimizer.param_groups)

    def _bound(self, group: dict[str, Any]) -> float | None:
        return group.get("clip_grad_norm") if self._clip_grad_norm is None else self._clip_grad_norm

    def _norm(self, sums: Tensor) -> Tensor:
        norm = sums[0].sqrt().float()
        return norm if self._inv_scale is None else norm * self._inv_scale.to(norm.device, non_blocking=True)

    def _running_norm(self) -> Tensor:
        total, weight = self._kept(NORM, 0.0)
        return torch.where(weight > 0, total / weight, 0.0)

    def _kept(self, key: str, first: float) -> Tensor:
        """Return the pair of numbers that a group keeps under this key, where they are used."""
        group = self._optimizer.param_groups[0]
        if key not in group:
            group[key] = torch.tensor([first, 0.0], device=self._device)
        if group[key].device != self._device:
            group[key] = group[key].to(self._device)
        kept: Tensor = group[key]
        return kept


def _adapt(kept: Tensor, finite: Tensor) -> None:
    """Halve the scale after an overflow, double it after GROWTH_INTERVAL passes without; [scale, passes] in place."""
    scale, passes = kept[0], torch.where(finite, kept[1] + 1, 0.0)
    grows = passes >= GROWTH_INTERVAL
    new = torch.where(finite, torch.where(grows, scale * GROWTH, scale), scale * BACKOFF)
    kept.copy_(torch.stack([new.clamp(SMALLEST_SCALE, LARGEST_SCALE), torch.where(grows, 0.0, passes)]))
