"""AdamW in one launch: fp32 arithmetic and state, or state in the parameters' bfloat16 with stochastic rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_kernels.elementwise import adamw_

from .base import LowMemOptimizer
from .buckets import Bucket
from .checks import CommonOptions, check_betas, check_choice, check_number, check_state_dtype


class AdamW(LowMemOptimizer):
    """AdamW, the baseline that the other optimizers are measured against.

    ``m += (1 - b1)(g - m)``, ``v += (1 - b2)(g² - v)``,
    ``p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + lr weight_decay p``

    Args:
        params: parameters, (name, parameter) pairs or groups; float32, bfloat16 or float16.
        lr: step length, in units of the parameter for each normalized update.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the square root, in units of the gradient, > 0.
        weight_decay: decoupled, multiplied by lr.
        state_dtype: "fp32" (8 bytes for each element) or "param": the parameter's dtype, which has to be bfloat16 (4
            bytes) or float32.
        **options: see CommonOptions.

    State: ``exp_avg`` and ``exp_avg_sq`` of the parameter's shape, ``step``, ``uid``. That of torch.optim.AdamW loads.

    Source: arXiv 1711.05101, algorithm 2; the decay is multiplied by lr as in torch.optim.AdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: str = "fp32",
        **options: Unpack[CommonOptions],
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, own, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_betas(options["betas"], 2)
        check_number(
            "eps", options["eps"], positive=True
        )  # 0 would divide 0 by 0 wherever a gradient has always been 0
        check_number("weight_decay", options["weight_decay"])
        check_choice("state_dtype", options["state_dtype"], ("fp32", "param"))

    def check_param(self, param: Tensor, group: Mapping[str, Any]) -> None:
        super().check_param(param, group)
        check_state_dtype(param, group)

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        dtype = param.dtype if group["state_dtype"] == "param" else torch.float32
        moments = ("exp_avg", "exp_avg_sq")
        return {key: torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format) for key in moments}

    def takes_pieces(self, bucket: Bucket) -> bool:
        return True

    def update(self, bucket: Bucket) -> None:
        group = bucket.group
        adamw_(
            bucket.params,
            bucket.grads,
            bucket.state("exp_avg"),
            bucket.state("exp_avg_sq"),
            bucket.state("step"),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            shards=bucket.shards,
            **bucket.options(),
        )
