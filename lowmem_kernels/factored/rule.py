"""The dialects of Adafactor as data: what tells transformers', torch's, AdaLomo's and CAME's update apart."""

from __future__ import annotations

from dataclasses import dataclass

LR_SCHEDULES = ("constant", "rsqrt", "warmup")


@dataclass(frozen=True)
class FactoredRule:
    """How the second moment is kept, and how an update is made of it. t is the number of the update, from 1.

    Attributes:
        eps: (eps1, eps2). eps1 is in units of the squared gradient if added and of the gradient if a floor, see
            ``eps_floor``; eps2 bounds RMS(p) from below where ``scale_parameter``, in units of the parameter.
        eps_floor: False adds eps1 to the squared gradient. True, torch.optim's way, bounds mean(R) by eps1 and each
            element of V by eps1² from below.
        beta2: decay rate of the second moment; None: ``1 - t**decay_rate``.
        decay_rate: negative exponent of that schedule.
        clip_threshold: d; an update whose RMS is larger is scaled down to it.
        lr_schedule: the rate at t is lr ("constant"), ``min(lr, 1/sqrt(t))`` ("rsqrt") or ``min(lr t, 1/sqrt(t))``
            ("warmup").
        scale_parameter: multiply the rate by ``max(eps2, RMS(p))``.
        scale_decay: multiply weight decay by that scheduled and scaled rate; False: by lr alone.
        beta1: decay rate of a momentum of the scaled update; None: no momentum.
    """

    eps: tuple[float, float] = (1e-30, 1e-3)
    eps_floor: bool = False
    beta2: float | None = None
    decay_rate: float = -0.8
    clip_threshold: float = 1.0
    lr_schedule: str = "constant"
    scale_parameter: bool = True
    scale_decay: bool = True
    beta1: float | None = None
