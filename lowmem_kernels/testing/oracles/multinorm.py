"""Multi-normalizing rules and their fallbacks in float64 NumPy: a scaled X at every half-step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .elementwise import adamw
from .factored import adafactor
from .types import AllGrads, AllOptions, Array, End, Options, Oracle, State
from .whitening import normalized, whitened

#: What MNGD does if told nothing. fallback_ratio: the fallback's lr in units of lr; None: scale.
DEFAULTS = {
    "norms": ("row", "col"),
    "iterations": 5,
    "scale": 0.05,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "nesterov": False,
    "momentum_after": False,
    "eps": None,
    "solver": "coupled",
    "solver_iterations": None,
    "beta": 0.5,
    "stacks": None,
    "fallback": "adamw",
    "fallback_ratio": None,
    "fallback_betas": (0.9, 0.999),
    "fallback_eps": 1e-8,
}
#: What SWAN does if told nothing, where that is not what MNGD does.
SWAN = {"iterations": None, "beta": 0.8, "center": True}


def mngd(params: Sequence[Array], grads: AllGrads, options: AllOptions) -> End:
    """2502.06742: matrices by algorithms 1 and 2, the rest by the fallback."""
    ends, states = [], []
    for i, p in enumerate(params):
        steps = [{**DEFAULTS, **os[i]} for os in options]
        own = is_matrix(p.shape, steps[0]["stacks"])
        end, state = (_matrix if own else fallback)(p, [gs[i] for gs in grads], steps)
        ends.append(end)
        states.append(state)
    return ends, states


def sinkgd(params: Sequence[Array], grads: AllGrads, options: AllOptions) -> End:
    """2502.06742, algorithms 3 and 4: rows and columns in turns."""
    return mngd(params, grads, [[{**o, "norms": ("row", "col")} for o in os] for os in options])


def swan(params: Sequence[Array], grads: AllGrads, options: AllOptions) -> End:
    """2412.13148, algorithms 1 and 2. Of matrices it is a multi-normalization: rows, then once a spectral norm."""
    return mngd(params, grads, [[_as_mngd({**SWAN, **o}) for o in os] for os in options])


def _as_mngd(o: Options) -> Options:
    rows = "gradnorm" if o["center"] else "row"
    return {**o, "norms": (rows, "spectral"), "iterations": 1, "solver_iterations": o["iterations"]}


def is_matrix(shape: tuple[int, ...], stacks: str | None) -> bool:
    """Whether a parameter gets the rule of matrices, which more than two dimensions do where ``stacks`` says how."""
    return len(shape) == 2 or (len(shape) > 2 and stacks is not None)


def _matrix(p: Array, grads: Sequence[Array], options: Sequence[Options]) -> tuple[Array, State]:
    """2502.06742, algorithm 2, for each matrix of a stack, with the momenta that MNGD's docstring says."""
    m = 0 * p
    for g, o in zip(grads, options, strict=True):
        mu = o["momentum"]
        if o["momentum_after"]:
            x = _multi_norm_of_stack(g, o)
            m = m + (1 - mu) * (x - m)
            x = x + mu * (m - x) if o["nesterov"] else m
        else:
            m = mu * m + g
            x = _multi_norm_of_stack(g + mu * m if o["nesterov"] else m, o)
        p = p - o["lr"] * (o["scale"] * x + o["weight_decay"] * p)
    return p, {"exp_avg": m} if mu else {}


def _multi_norm_of_stack(z: Array, o: Options) -> Array:
    if z.ndim > 2 and o["stacks"] == "conv":
        return multi_norm(z.reshape(z.shape[0], z[:1].size), o).reshape(z.shape)
    if z.ndim > 2:
        return np.stack([multi_norm(each, o) for each in z.reshape(-1, *z.shape[-2:])]).reshape(z.shape)
    return multi_norm(z, o)


def multi_norm(z: Array, o: Options) -> Array:
    """Algorithm 1: x = z, then for l in 1 .. L, for each norm g: x = P_g(x)."""
    x = z
    for _ in range(o["iterations"]):
        for norm in o["norms"]:
            x = _spectral(x, o) if norm == "spectral" else _PROJECTIONS[norm](x, o["eps"] or 0.0)
    return x


def _spectral(x: Array, o: Options) -> Array:
    """The solver's iteration on the singular values, and its limit where o has no beta."""
    if o["beta"] is not None:
        return whitened(x, None, o["solver"], o["solver_iterations"], o["beta"])[0]
    u, _, v = np.linalg.svd(x, full_matrices=False)
    return u @ v * np.sqrt(max(x.shape))


def _inverse(lengths: Array, eps: float) -> Array:
    """1 / max(length, eps), and 0 of nothing."""
    lengths = np.maximum(lengths, eps)
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)


_PROJECTIONS: dict[str, Callable[[Array, float], Array]] = {
    "row": lambda x, eps: np.sqrt(x.shape[1]) * np.diag(_inverse(np.sqrt((x**2).sum(1)), eps)) @ x,
    "col": lambda x, eps: np.sqrt(x.shape[0]) * x @ np.diag(_inverse(np.sqrt((x**2).sum(0)), eps)),
    "frobenius": lambda x, eps: np.sqrt(x.size) * _inverse(np.sqrt((x**2).sum(keepdims=True)), eps) * x,
    "sign": lambda x, eps: np.sign(x),
    "gradnorm": lambda x, eps: normalized(x, "gradnorm"),
}


def fallback(p: Array, grads: Sequence[Array], options: Sequence[Options]) -> tuple[Array, State]:
    """The rule of what is no matrix, at lr times fallback_ratio."""
    steps = []
    for o in options:
        ratio = o["scale"] if o["fallback_ratio"] is None else o["fallback_ratio"]
        own = {"lr": o["lr"] * ratio, "weight_decay": o["weight_decay"]}
        if o["fallback"] == "adamw":
            own |= {"betas": o["fallback_betas"], "eps": o["fallback_eps"]}
        if o["fallback"] == "adafactor":
            own |= {"relative_step": False, "scale_parameter": False}
        steps.append(own)
    if options[0]["fallback"] == "table":
        return _table(p, grads, steps)
    rules: dict[str, Oracle] = {"adamw": adamw, "adafactor": adafactor}
    ends, states = rules[options[0]["fallback"]]([p], [[g] for g in grads], [[o] for o in steps])
    return ends[0], states[0]


def _table(p: Array, grads: Sequence[Array], options: Sequence[Options]) -> tuple[Array, State]:
    """DeepSeek-V4.1's update of tables, with 11 half-steps of which the first and last are rows."""
    m = 0 * p
    for g, o in zip(grads, options, strict=True):
        m = 0.9 * m + g
        x = (0.9 * m + g).reshape(-1, *(p.shape[-2:] if p.ndim >= 2 else (1, p.size)))
        for k, each in enumerate(x):
            norms = np.sqrt((each**2).sum(1))
            each = np.where((norms < 1e-3 * norms.mean())[:, None], 0, each)
            for half_step in range(1, 12):
                each = _PROJECTIONS["row" if half_step % 2 else "col"](each, 0.0)
            x[k] = each
        p = p - o["lr"] * (0.18 * x.reshape(p.shape) + o["weight_decay"] * p)
    return p, {"exp_avg": m}
