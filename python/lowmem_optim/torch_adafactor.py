"""Adafactor as in torch.optim: lr is a bound on the step, and eps1 a floor instead of a summand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_kernels.factored import FactoredRule

from .checks import CommonOptions, check_choice, check_number
from .factored import FactoredOptimizer, check_decay_rate, check_eps


class TorchAdafactor(FactoredOptimizer):
    """Adafactor by torch.optim.Adafactor's rule and with its constructor.

    With q = g², w = t^beta2_decay, and the second moment kept as the means of q over rows and columns:

    ``R += w (mean_j q - R)``, ``C += w (mean_i q - C)``, ``V = R C / max(mean(R), eps1)``, for vectors
    ``V += w (q - V)``, ``u = g / sqrt(max(V, eps1²))``, ``u /= max(1, RMS(u) / d)``,
    ``rate = min(lr, 1/sqrt(t)) max(eps2, RMS(p))``, ``p -= rate u + lr weight_decay p``

    Args:
        params: parameters, (name, parameter) pairs or groups; float32, bfloat16 or float16.
        lr: bound on the step length, in units of RMS(p).
        beta2_decay: exponent, <= 0, of the weight of a new squared gradient.
        eps: (eps1, eps2): in units of the gradient, and of the parameter. An eps1 of None is the spacing of float32 at
            1, for all parameters: torch takes that of a parameter's dtype, at which bfloat16 is not adaptive any more.
        d: RMS that an update may have, > 0.
        weight_decay: decoupled, multiplied by lr.
        foreach: taken as torch.optim takes it, without effect: one launch serves all parameters anyway.
        **options: see CommonOptions.

    State: as `Adafactor`, in float32 whatever the parameter. That of torch.optim.Adafactor loads.

    Source: arXiv 1804.04235 as changed by torch.optim.Adafactor.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
        }
        super().__init__(params, own, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_eps(_with_default(options["eps"]))
        check_number("d", options["d"], positive=True)
        check_decay_rate("beta2_decay", options["beta2_decay"])
        check_number("weight_decay", options["weight_decay"])
        check_choice("foreach", options["foreach"], (None, True, False))

    def rule(self, group: Mapping[str, Any]) -> FactoredRule:
        return FactoredRule(
            eps=tuple(_with_default(group["eps"])),
            eps_floor=True,
            decay_rate=group["beta2_decay"],
            clip_threshold=group["d"],
            lr_schedule="rsqrt",
            scale_decay=False,
        )


def _with_default(eps: Any) -> Any:
    """``eps`` with the spacing of float32 at 1 for an eps1 of None, and anything else as it is."""
    if isinstance(eps, (tuple, list)) and len(eps) == 2 and eps[0] is None:
        return torch.finfo(torch.float32).eps, eps[1]
    return eps
