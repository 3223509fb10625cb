"""Adafactor as in transformers: second moments in rows and columns, and steps in units of the parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_kernels.factored import FactoredRule

from .checkpoint import Foreign
from .checks import CommonOptions, check_choice, check_number, check_state_dtype
from .factored import FactoredOptimizer, check_decay_rate, check_eps, new_momentum


def _options_of_torch(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """Say in our options what a group of torch.optim.Adafactor says; its eps1, a floor, has no equal and ours stays."""
    if "beta2_decay" not in saved:
        return saved
    others = {key: value for key, value in saved.items() if key not in ("beta2_decay", "d", "foreach")}
    return {
        **others,
        "eps": (defaults["eps"][0], saved["eps"][1]),
        "clip_threshold": saved["d"],
        "decay_rate": saved["beta2_decay"],
        "beta1": None,
        "scale_parameter": True,
        # min(lr, 1/sqrt(t)) exists here for one lr; any other one is below 1/sqrt(t) for a long time
        "relative_step": float(saved["lr"]) == 1e-2,
        "warmup_init": False,
    }


class Adafactor(FactoredOptimizer):
    """Adafactor, a drop-in for transformers.Adafactor.

    With q = g² + eps1, w = t^decay_rate, and the second moment kept as the means of q over rows and columns:

    ``R += w (mean_j q - R)``, ``C += w (mean_i q - C)``, ``V = R C / mean(R)``, for vectors ``V += w (q - V)``,
    ``u = g / sqrt(V)``, ``u /= max(1, RMS(u) / clip_threshold)``, ``rate = lr max(eps2, RMS(p))``,
    ``p -= rate u + rate weight_decay p``; with beta1 ``m += (1 - beta1)(rate u - m)`` takes the place of rate u.

    Args:
        params: parameters, (name, parameter) pairs or groups; float32, bfloat16 or float16.
        lr: step length: in units of RMS(p) where ``scale_parameter``, else of the parameter; None with
            ``relative_step``.
        eps: (eps1, eps2): in units of the squared gradient, and of the parameter.
        clip_threshold: RMS that an update may have, > 0.
        decay_rate: exponent, <= 0, of the weight of a new squared gradient.
        beta1: decay rate of a momentum of the updates; None: no momentum.
        weight_decay: decoupled, multiplied by the rate.
        scale_parameter: multiply lr by ``max(eps2, RMS(p))``.
        relative_step: ``min(1e-2, 1/sqrt(t))`` takes the place of lr, and what schedulers write there is ignored.
        warmup_init: ``min(1e-6 t, 1/sqrt(t))`` does.
        state_dtype: of ``exp_avg``: "fp32" or "param", the parameter's dtype, which has to be bfloat16 or float32.
        **options: see CommonOptions.

    State: ``exp_avg_sq_row`` and ``exp_avg_sq_col`` of [..., n] and [..., m] elements, or ``exp_avg_sq`` below two
    dimensions, in float32; ``exp_avg`` if there is a beta1; ``step``, ``uid``. That of transformers.Adafactor loads,
    and that of torch.optim.Adafactor, which then carries on by the rule above.

    Source: arXiv 1804.04235, algorithms 4 and 5; momentum and weight decay as in transformers.
    """

    foreign = Foreign(FactoredOptimizer.foreign.states, _options_of_torch)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        state_dtype: str = "fp32",
        **options: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "state_dtype": state_dtype,
        }
        super().__init__(params, own, options)
        # only here: later, schedulers write an lr into groups that make their own
        if lr is not None and relative_step:
            raise ValueError(f"lr is {lr!r}; allowed: None, since relative_step is True")

    def check_lr(self, options: Mapping[str, Any]) -> None:
        if options["lr"] is not None or options["relative_step"] is False:
            super().check_lr(options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_eps(options["eps"])
        check_number("clip_threshold", options["clip_threshold"], positive=True)
        check_decay_rate("decay_rate", options["decay_rate"])
        if options["beta1"] is not None:
            check_number("beta1", options["beta1"], below=1)
        check_number("weight_decay", options["weight_decay"])
        for name in ("scale_parameter", "relative_step", "warmup_init"):
            check_choice(name, options[name], (True, False))
        if options["warmup_init"] and not options["relative_step"]:
            raise ValueError("warmup_init is True; allowed: False, since relative_step is False")
        check_choice("state_dtype", options["state_dtype"], ("fp32", "param"))

    def check_param(self, param: Tensor, group: Mapping[str, Any]) -> None:
        super().check_param(param, group)
        check_state_dtype(param, group)

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        momentum = {} if group["beta1"] is None else new_momentum(param, group)
        return {**momentum, **super().new_state(param, group)}

    def rule(self, group: Mapping[str, Any]) -> FactoredRule:
        relative = "warmup" if group["warmup_init"] else "rsqrt"
        return FactoredRule(
            eps=tuple(group["eps"]),
            decay_rate=group["decay_rate"],
            clip_threshold=group["clip_threshold"],
            lr_schedule=relative if group["relative_step"] else "constant",
            scale_parameter=group["scale_parameter"],
            beta1=group["beta1"],
        )

    def rates(self, group: Mapping[str, Any]) -> tuple[float | Tensor, float]:
        if not group["relative_step"]:
            return super().rates(group)
        # torch.distributed.checkpoint makes state by a step with lr 0 and zero gradients, which must not move anything
        lr = group["lr"]
        on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
        weight_decay = 0.0 if on_host and lr == 0 else group["weight_decay"]
        return 1e-6 if group["warmup_init"] else 1e-2, weight_decay

    def _get_lr(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        """Return the rate of the group's first parameter, which transformers.AdafactorSchedule asks for and reports."""
        param, step = group["params"][0], max(1.0, float(state.get("step", 1.0)))
        relative = min(1e-6 * step if group["warmup_init"] else 1e-2, step**-0.5)
        rate = relative if group["relative_step"] else float(group["lr"])
        if not group["scale_parameter"]:
            return rate
        rms = torch.linalg.vector_norm(param.detach(), dtype=torch.float32).item() / max(1, param.numel()) ** 0.5
        return rate * max(group["eps"][1], rms)
