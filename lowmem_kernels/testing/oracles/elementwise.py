"""Adam with decoupled and with coupled decay, and gradient descent, in float64 NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .types import AllGrads, AllOptions, Array, End, Grads, Options

#: Where implementations of Adam put eps, by name: sqrt(v / c) + eps, sqrt(v / c + eps), sqrt(v) + eps before it is
#: divided by sqrt(c), c being what corrects the bias of v.
ADAM_EPS = ("outside", "inside", "uncorrected")

#: What both do if told nothing.
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "eps_place": "outside"}


def adamw(params: Sequence[Array], grads: AllGrads, options: AllOptions) -> End:
    """AdamW: 1711.05101, algorithm 2, with the decay multiplied by lr."""
    return _adam(params, grads, options, coupled=False)


def adam(params: Sequence[Array], grads: AllGrads, options: AllOptions) -> End:
    """Adam: 1412.6980, algorithm 1, with weight_decay * p added to the gradient."""
    return _adam(params, grads, options, coupled=True)


def _adam(params: Sequence[Array], grads: AllGrads, options: AllOptions, coupled: bool) -> End:
    params = list(params)
    m, v = [0 * p for p in params], [0 * p for p in params]
    for t in range(1, len(grads) + 1):
        for i, (g, given) in enumerate(zip(grads[t - 1], options[t - 1], strict=True)):
            o = {**ADAM, **given}
            beta1, beta2 = o["betas"]
            g = g + o["weight_decay"] * params[i] if coupled else g
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            m_hat, denominator = m[i] / (1 - beta1**t), _root(v[i], 1 - beta2**t, o["eps"], o["eps_place"])
            decay = 0 if coupled else o["weight_decay"] * params[i]
            params[i] = params[i] - o["lr"] * (m_hat / denominator + decay)
    return params, [{"exp_avg": a, "exp_avg_sq": b} for a, b in zip(m, v, strict=True)]


def _root(v: Array, correction: float, eps: float, place: str) -> Array:
    if place == "inside":
        return np.sqrt(v / correction + eps)
    return np.sqrt(v / correction) + (eps / np.sqrt(correction) if place == "uncorrected" else eps)


def sgd(params: Sequence[Array], grads: AllGrads, options: AllOptions) -> End:
    """Gradient descent as LOMO's (2306.09782), with decoupled decay, and clipping by value and by the norm of all."""
    params = list(params)
    for gs, os in zip(grads, options, strict=True):
        for i, (g, o) in enumerate(zip(clip_as_lomo(gs, os), os, strict=True)):
            params[i] = (1 - o["lr"] * o.get("weight_decay", 0.0)) * params[i] - o["lr"] * g
    return params, [{} for _ in params]


def clip_as_lomo(grads: Grads, options: Sequence[Options]) -> Grads:
    """Gradients of a step after clip_grad_value and clip_grad_norm of the package lomo-optim."""
    norm = np.sqrt(sum(np.sum(g**2) for g in grads))
    result = []
    for g, o in zip(grads, options, strict=True):
        if o.get("clip_grad_value") is not None:
            g = np.clip(g, -o["clip_grad_value"], o["clip_grad_value"])
        if o.get("clip_grad_norm") is not None:
            g = g * min(1.0, o["clip_grad_norm"] / (norm + 1e-6))
        result.append(g)
    return result
