"""LOMO's update rule: the scaled gradient, clipped, and no state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_kernels.elementwise import scaled_update_

from .base import LowMemOptimizer
from .buckets import Bucket
from .checks import CommonOptions, check_clipping, check_number


class Lomo(LowMemOptimizer):
    """LOMO's update: ``p -= lr (g + weight_decay p)`` with g clipped in the same launch.

    ``g = clamp(grad / loss_scale, ±clip_grad_value) * min(1, clip_grad_norm / (norm + 1e-6))``, where norm is that of
    all gradients before the clamp. It costs one extra read of them; torch.nn.utils.clip_grad_norm_ also rewrites them.

    Args:
        params: parameters, (name, parameter) pairs or groups; float32, bfloat16 or float16.
        lr: step length, in units of the parameter for a unit of gradient.
        clip_grad_norm: bound on the norm of all gradients together, > 0; None: no bound.
        clip_grad_value: bound on each gradient element, > 0; None: no bound.
        weight_decay: decoupled, multiplied by lr; not in the paper, but in its package.
        **options: see CommonOptions.

    State: ``step`` and ``uid``, which key the rounding noise: nothing for each element. `fuse_backward` makes it the
    published algorithm, which updates inside the backward pass; otherwise gradients are kept until `step`.

    Source: arXiv 2306.09782; order of scale, clamp and clip as in the lomo-optim package.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
        **options: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "clip_grad_norm": clip_grad_norm,
            "clip_grad_value": clip_grad_value,
            "weight_decay": weight_decay,
        }
        super().__init__(params, own, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_clipping(options)
        check_number("weight_decay", options["weight_decay"])

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        return {}

    def takes_pieces(self, bucket: Bucket) -> bool:
        return True

    def update(self, bucket: Bucket) -> None:
        scaled_update_(
            bucket.params,
            bucket.grads,
            bucket.state("step"),
            lr=bucket.group["lr"],
            weight_decay=bucket.group["weight_decay"],
            shards=bucket.shards,
            **bucket.options(),
        )
