"""What the oracles of factored rules share: float64 NumPy, with the sums of the papers where code has means."""

import numpy as np
import torch


class SecondMoment:
    """Of one parameter: R and C, sums over the rows and columns of each matrix, or V below two dimensions."""

    def __init__(self, shape):
        self.full = np.zeros(shape) if len(shape) < 2 else None
        self.row, self.col = (
            (None, None) if len(shape) < 2 else (np.zeros(shape[:-1]), np.zeros(shape[:-2] + shape[-1:]))
        )

    def move(self, q, weight):
        """R = (1 - weight) R + weight q 1, and so on."""
        if self.full is not None:
            self.full = (1 - weight) * self.full + weight * q
        else:
            self.row = (1 - weight) * self.row + weight * q.sum(-1)
            self.col = (1 - weight) * self.col + weight * q.sum(-2)

    def estimate(self, floor=0.0):
        """V, or R C / sum(R), of which the mean of the row means is at least ``floor``."""
        if self.full is not None:
            return self.full
        n, m = self.row.shape[-1], self.col.shape[-1]
        total = np.maximum(self.row.sum(-1), floor * n * m)
        return self.row[..., :, None] * self.col[..., None, :] / total[..., None, None]

    def state(self, prefix="exp_avg_sq"):
        """The means of which the optimizers' states consist."""
        if self.full is not None:
            return {prefix: self.full}
        n, m = self.row.shape[-1], self.col.shape[-1]
        return {f"{prefix}_row": self.row / m, f"{prefix}_col": self.col / max(n, 1)}


def rms(x):
    return np.sqrt(np.sum(x**2) / max(x.size, 1))


def clipped(u, threshold):
    return u / max(1.0, rms(u) / threshold)


def adafactor(params, grads, options, transform=lambda gs, os: gs):
    """1804.04235, algorithms 4 and 5; momentum, decay, warm-up and the lr that is given are those of transformers.

    ``transform``: what is done to all gradients of a step before, given their options.
    """
    params = list(params)
    moments, m = [SecondMoment(p.shape) for p in params], [0 * p for p in params]
    for t in range(1, len(grads) + 1):
        gs, os = grads[t - 1], [{**TRANSFORMERS, **o} for o in options[t - 1]]
        for i, (g, o) in enumerate(zip(transform(gs, os), os, strict=True)):
            moments[i].move(g**2 + o["eps"][0], t ** o["decay_rate"])
            u = clipped(g / np.sqrt(moments[i].estimate()), o["clip_threshold"])
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


#: what transformers.Adafactor does if told nothing
TRANSFORMERS = {
    "eps": (1e-30, 1e-3),
    "clip_threshold": 1.0,
    "decay_rate": -0.8,
    "beta1": None,
    "weight_decay": 0.0,
    "scale_parameter": True,
    "relative_step": True,
    "warmup_init": False,
}


def factors(shape, prefix="exp_avg_sq"):
    """{key: (shape, dtype)} of the second moment of a parameter."""
    if len(shape) < 2:
        return {prefix: (shape, torch.float32)}
    return {
        f"{prefix}_row": (shape[:-1], torch.float32),
        f"{prefix}_col": (shape[:-2] + shape[-1:], torch.float32),
    }


def scaled_by_parameter(param, lr):
    """What weight decay is multiplied by, where it is lr RMS(p)."""
    return lr * max(1e-3, rms(param))


#: wrong values of the options that all factored rules have
WRONG_COMMON = [
    ("eps", (1e-30,)),
    ("eps", (-1e-30, 1e-3)),
    ("eps", (1e-30, float("nan"))),
    ("eps", 1e-30),
    ("eps", (1e-30, None)),
    ("weight_decay", -0.1),
    ("weight_decay", float("inf")),
]
WRONG_CLIP = [("clip_threshold", 0.0), ("clip_threshold", -1.0), ("clip_threshold", None)]
WRONG_RATE = [("decay_rate", 0.8), ("decay_rate", float("-inf")), ("decay_rate", None), ("decay_rate", True)]
