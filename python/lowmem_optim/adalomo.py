"""AdaLomo's update rule: LOMO with factored second moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_kernels.factored import FactoredRule

from .checks import CommonOptions, check_clipping, check_number
from .factored import FactoredOptimizer, check_decay_rate, check_eps


class AdaLomo(FactoredOptimizer):
    """AdaLomo's update, which is that of `Adafactor` with an lr, relative to the parameter and without momentum.

    ``g = clamp(grad / loss_scale, ±clip_grad_value) * min(1, clip_grad_norm / (norm + 1e-6))`` as in `Lomo`; with
    q = g² + eps1, w = t^decay_rate, and the second moment kept as the means of q over rows and columns:

    ``R += w (mean_j q - R)``, ``C += w (mean_i q - C)``, ``V = R C / mean(R)``, for vectors ``V += w (q - V)``,
    ``u = g / sqrt(V)``, ``u /= max(1, RMS(u) / clip_threshold)``, ``rate = lr max(eps2, RMS(p))``,
    ``p -= rate u + rate weight_decay p``

    Args:
        params: parameters, (name, parameter) pairs or groups; float32, bfloat16 or float16.
        lr: step length, in units of RMS(p).
        eps: (eps1, eps2): in units of the squared gradient, and of the parameter.
        clip_threshold: RMS that an update may have, > 0.
        decay_rate: exponent, <= 0, of the weight of a new squared gradient.
        clip_grad_norm: bound on the norm of all gradients together, > 0; None: no bound. Updates are normalized for
            each parameter, so that it is seldom needed.
        clip_grad_value: bound on each gradient element, > 0; None: no bound.
        weight_decay: decoupled, multiplied by the rate; not in the paper, but in its package.
        **options: see CommonOptions.

    State: as `Adafactor` without momentum. `fuse_backward` makes it the published algorithm, which updates inside the
    backward pass; otherwise gradients are kept until `step`.

    Source: arXiv 2310.10195, algorithm 1, with the square root, eps1 and decay_rate of the lomo-optim package.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
        **options: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "clip_grad_norm": clip_grad_norm,
            "clip_grad_value": clip_grad_value,
            "weight_decay": weight_decay,
        }
        super().__init__(params, own, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_eps(options["eps"])
        check_number("clip_threshold", options["clip_threshold"], positive=True)
        check_decay_rate("decay_rate", options["decay_rate"])
        check_clipping(options)
        check_number("weight_decay", options["weight_decay"])

    def rule(self, group: Mapping[str, Any]) -> FactoredRule:
        return FactoredRule(
            eps=tuple(group["eps"]), decay_rate=group["decay_rate"], clip_threshold=group["clip_threshold"]
        )
