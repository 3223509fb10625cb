"""Rules with a second moment in rows and columns in float64 NumPy, with the sums of the papers where code has means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .elementwise import clip_as_lomo
from .types import AllGrads, AllOptions, Array, End, Grads, Options, State

#: Where implementations put eps1, by name: g² + eps1 before it is summed; max(sqrt(V), eps1), with the mean of the row
#: means at least eps1; sqrt(V) + eps1; sqrt(V + eps1).
FACTORED_EPS = ("square", "floor", "outside", "inside")

#: What transformers.Adafactor does if told nothing.
TRANSFORMERS = {
    "eps": (1e-30, 1e-3),
    "clip_threshold": 1.0,
    "decay_rate": -0.8,
    "beta1": None,
    "weight_decay": 0.0,
    "scale_parameter": True,
    "relative_step": True,
    "warmup_init": False,
    "eps_place": "square",
}
#: What torch.optim.Adafactor does if told nothing.
TORCH = {"eps": (None, 1e-3), "beta2_decay": -0.8, "d": 1.0, "weight_decay": 0.0, "eps_place": "floor"}
#: What CAME does if told nothing.
CAME = {
    "betas": (0.9, 0.999, 0.9999),
    "eps": (1e-30, 1e-16),
    "clip_threshold": 1.0,
    "weight_decay": 0.0,
    "eps_place": "square",
}


class SecondMoment:
    """Of one parameter: R and C, sums over the rows and columns of each matrix, or V below two dimensions."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.factored = len(shape) >= 2
        self.full = np.zeros(() if self.factored else shape)
        self.row, self.col = np.zeros(shape[:-1]), np.zeros(shape[:-2] + shape[-1:])

    def move(self, q: Array, weight: float) -> None:
        """R = (1 - weight) R + weight q 1, and so on."""
        if not self.factored:
            self.full = (1 - weight) * self.full + weight * q
        else:
            self.row = (1 - weight) * self.row + weight * q.sum(-1)
            self.col = (1 - weight) * self.col + weight * q.sum(-2)

    def estimate(self, floor: float = 0.0) -> Array:
        """V, or R C / sum(R), of which the mean of the row means is at least ``floor``."""
        if not self.factored:
            return self.full
        n, m = self.row.shape[-1], self.col.shape[-1]
        total = np.maximum(self.row.sum(-1), floor * n * m)
        return self.row[..., :, None] * self.col[..., None, :] / total[..., None, None]

    def state(self, prefix: str = "exp_avg_sq") -> State:
        """The means of which the optimizers' states consist."""
        if not self.factored:
            return {prefix: self.full}
        n, m = self.row.shape[-1], self.col.shape[-1]
        return {f"{prefix}_row": self.row / m, f"{prefix}_col": self.col / max(n, 1)}


def rms(x: Array) -> float:
    """Root mean square; 0 of nothing."""
    return float(np.sqrt(np.sum(x**2) / max(x.size, 1)))


def clipped(u: Array, threshold: float) -> Array:
    """u, scaled down to an RMS of ``threshold`` if it is larger."""
    return u / max(1.0, rms(u) / threshold)


def _divided(g: Array, moment: SecondMoment, weight: float, eps: float, place: str) -> Array:
    """g over the root of its second moment, which g moves first."""
    moment.move(g**2 + (eps if place == "square" else 0), weight)
    if place == "floor":
        return g / np.maximum(np.sqrt(moment.estimate(floor=eps)), eps)
    inside, outside = (eps if place == name else 0.0 for name in ("inside", "outside"))
    return g / (np.sqrt(moment.estimate() + inside) + outside)


def adafactor(
    params: Sequence[Array],
    grads: AllGrads,
    options: AllOptions,
    transform: Callable[[Grads, Sequence[Options]], Grads] = lambda gs, os: gs,
) -> End:
    """1804.04235, algorithms 4 and 5; momentum, decay, warm-up and the lr that is given are those of transformers.

    ``transform``: what is done to all gradients of a step before, given their options.
    """
    params = list(params)
    moments, m = [SecondMoment(p.shape) for p in params], [0 * p for p in params]
    for t in range(1, len(grads) + 1):
        gs, os = grads[t - 1], [{**TRANSFORMERS, **o} for o in options[t - 1]]
        for i, (g, o) in enumerate(zip(transform(gs, os), os, strict=True)):
            u = _divided(g, moments[i], t ** o["decay_rate"], o["eps"][0], o["eps_place"])
            u = clipped(u, o["clip_threshold"])
            rate = o["lr"]
            if o["relative_step"]:
                rate = min(1e-6 * t if o["warmup_init"] else 1e-2, 1 / np.sqrt(t))
            if o["scale_parameter"]:
                rate = max(o["eps"][1], rms(params[i])) * rate
            u = rate * u
            if o["beta1"] is not None:
                m[i] = u = o["beta1"] * m[i] + (1 - o["beta1"]) * u
            params[i] = params[i] - u - rate * o["weight_decay"] * params[i]
    momenta = [{"exp_avg": a} if o["beta1"] is not None else {} for a, o in zip(m, os, strict=True)]
    return params, [{**first, **second.state()} for first, second in zip(momenta, moments, strict=True)]


def adalomo(params: Sequence[Array], grads: AllGrads, options: AllOptions) -> End:
    """AdaLomo (2310.10195): Adafactor's rule with an lr; what is divided and multiplied by RMS is called grouped
    normalization there. The square root, eps1 and the decay rate are those of the package lomo-optim.
    """
    options = [[{**o, "relative_step": False} for o in os] for os in options]
    return adafactor(params, grads, options, transform=clip_as_lomo)


def torch_adafactor(params: Sequence[Array], grads: AllGrads, options: AllOptions) -> End:
    """As torch's documentation has it, with its note: eps1 is squared under the root, and sums are means."""
    params = list(params)
    moments = [SecondMoment(p.shape) for p in params]
    for t in range(1, len(grads) + 1):
        for i, (g, given) in enumerate(zip(grads[t - 1], options[t - 1], strict=True)):
            o = {**TORCH, **given}
            eps1 = 2.0**-23 if o["eps"][0] is None else o["eps"][0]
            alpha = max(o["eps"][1], rms(params[i])) * min(o["lr"], 1 / np.sqrt(t))
            params[i] = params[i] - o["lr"] * o["weight_decay"] * params[i]
            u = _divided(g, moments[i], t ** o["beta2_decay"], eps1, o["eps_place"])
            params[i] = params[i] - alpha * clipped(u, o["d"])
    return params, [moment.state() for moment in moments]


def came(params: Sequence[Array], grads: AllGrads, options: AllOptions) -> End:
    """CAME: 2307.02047, algorithm 2, with the rule of the package came-pytorch for vectors."""
    params = list(params)
    m = [0 * p for p in params]
    moments, instabilities = ([SecondMoment(p.shape) for p in params] for _ in range(2))
    for gs, os in zip(grads, options, strict=True):
        for i, (g, given) in enumerate(zip(gs, os, strict=True)):
            o = {**CAME, **given}
            beta1, beta2, beta3 = o["betas"]
            u = clipped(_divided(g, moments[i], 1 - beta2, o["eps"][0], o["eps_place"]), o["clip_threshold"])
            m[i] = beta1 * m[i] + (1 - beta1) * u
            update = m[i]
            if g.ndim >= 2:
                instabilities[i].move((u - m[i]) ** 2 + o["eps"][1], 1 - beta3)
                update = m[i] / np.sqrt(instabilities[i].estimate())
            params[i] = params[i] - o["lr"] * (update + o["weight_decay"] * params[i])
    states = zip(m, moments, instabilities, strict=True)
    return params, [
        {"exp_avg": a, **b.state(), **(c.state("exp_avg_res") if a.ndim >= 2 else {})} for a, b, c in states
    ]
