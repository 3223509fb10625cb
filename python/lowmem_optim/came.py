"""CAME: Adafactor's update as a momentum, divided by how far updates stray from it, which is factored as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_kernels.factored import confidence_update_

from .base import LowMemOptimizer
from .buckets import Bucket
from .checkpoint import Foreign
from .checks import CommonOptions, check_betas, check_choice, check_number, check_state_dtype
from .factored import check_eps, new_factors, new_momentum, new_second_moment, second_moments


class CAME(LowMemOptimizer):
    """CAME, with the constructor of came_pytorch.CAME.

    With q = g² + eps1, and second moments kept as means over rows and columns:

    ``R += (1 - b2)(mean_j q - R)``, ``C += (1 - b2)(mean_i q - C)``, ``V = R C / mean(R)``, for vectors
    ``V += (1 - b2)(q - V)``, ``u = g / sqrt(V)``, ``u /= max(1, RMS(u) / clip_threshold)``, ``m += (1 - b1)(u - m)``,
    ``s = (u - m)² + eps2``, ``Rs += (1 - b3)(mean_j s - Rs)``, ``Cs += (1 - b3)(mean_i s - Cs)``,
    ``S = Rs Cs / mean(Rs)``, for vectors ``S = 1``, ``p -= lr m / sqrt(S) + lr weight_decay p``

    Args:
        params: parameters, (name, parameter) pairs or groups; float32, bfloat16 or float16.
        lr: step length, in units of the parameter for an update of RMS 1. Nothing bounds that RMS: it is 11 in the
            first step and falls slowly, so that lr has to be warmed up, and to be smaller than AdamW's.
        eps: (eps1, eps2): in units of the squared gradient, >= 0, and of the squared update, > 0.
        clip_threshold: RMS that u may have, > 0.
        betas: decay rates of the update, of the squared gradient and of the instability, each in [0, 1).
        weight_decay: decoupled, multiplied by lr.
        state_dtype: of ``exp_avg``: "fp32" or "param", the parameter's dtype, which has to be bfloat16 or float32.
        **options: see CommonOptions.

    State: ``exp_avg`` of the parameter's shape; in float32 ``exp_avg_sq_row``, ``exp_avg_sq_col``,
    ``exp_avg_res_row``, ``exp_avg_res_col`` of [..., n] and [..., m] elements, or ``exp_avg_sq`` below two dimensions;
    ``step``, ``uid``. That of came_pytorch.CAME loads.

    Source: arXiv 2307.02047, algorithm 2; vectors as in the came-pytorch package.
    """

    foreign = Foreign({"RMS": None})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-4,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
        *,
        state_dtype: str = "fp32",
        **options: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "betas": betas,
            "weight_decay": weight_decay,
            "state_dtype": state_dtype,
        }
        super().__init__(params, own, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_eps(options["eps"])
        # where the momentum is the update there is no instability, and 0 would divide by it
        check_number("eps[1]", options["eps"][1], positive=True)
        check_number("clip_threshold", options["clip_threshold"], positive=True)
        check_betas(options["betas"], 3)
        check_number("weight_decay", options["weight_decay"])
        check_choice("state_dtype", options["state_dtype"], ("fp32", "param"))

    def check_param(self, param: Tensor, group: Mapping[str, Any]) -> None:
        super().check_param(param, group)
        check_state_dtype(param, group)

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        residual = new_factors(param, "exp_avg_res") if param.ndim >= 2 else {}
        return {**new_momentum(param, group), **new_second_moment(param), **residual}

    def takes_pieces(self, bucket: Bucket) -> bool:
        return bucket.pieces() is not None

    def update(self, bucket: Bucket) -> None:
        group = bucket.group
        rows, cols = second_moments(bucket)
        confidence_update_(
            bucket.params,
            bucket.grads,
            bucket.state("exp_avg"),
            rows,
            cols,
            bucket.state("exp_avg_res_row"),
            bucket.state("exp_avg_res_col"),
            bucket.state("step"),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            clip_threshold=group["clip_threshold"],
            weight_decay=group["weight_decay"],
            pieces=bucket.pieces(),
            **bucket.options(),
        )
