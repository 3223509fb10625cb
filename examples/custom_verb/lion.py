"""Lion as an optimizer of this package: all but the rule, its options and its state comes with the base class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lion_kernels import lion_
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_optim.base import LowMemOptimizer
from lowmem_optim.buckets import Bucket
from lowmem_optim.checks import CommonOptions, check_betas, check_number


class Lion(LowMemOptimizer):
    """Lion: ``p -= lr (sign(b1 m + (1 - b1) g) + weight_decay p)``, ``m += (1 - b2) (g - m)``.

    Args:
        params: parameters, (name, parameter) pairs or groups; float32, bfloat16 or float16.
        lr: step length: what every element moves by in an update, but for the decay.
        betas: (b1, b2) in [0, 1).
        weight_decay: decoupled, multiplied by lr.
        **options: see CommonOptions.

    State: ``exp_avg`` of the parameter's shape: 2 bytes for each element of a bfloat16 parameter, rounded
    stochastically, else 4; ``step``, ``uid``.

    Source: arXiv 2302.06675, algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_betas(options["betas"], 2)
        check_number("weight_decay", options["weight_decay"])

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        dtype = torch.bfloat16 if param.dtype is torch.bfloat16 else torch.float32
        return {"exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)}

    def takes_pieces(self, bucket: Bucket) -> bool:
        return True

    def update(self, bucket: Bucket) -> None:
        lion_(
            bucket.params,
            bucket.grads,
            bucket.state("exp_avg"),
            bucket.state("step"),
            lr=bucket.group["lr"],
            betas=bucket.group["betas"],
            weight_decay=bucket.group["weight_decay"],
            shards=bucket.shards,
            **bucket.options(),
        )
