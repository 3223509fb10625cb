"""The oracle of multi-normalizing rules and their fallbacks: float64 NumPy with a scaled X at every half-step."""

import numpy as np
import torch

from optim.factored import adafactor, factors
from optim.opt_adamw import oracle as adamw
from whitening_oracles import normalized, whitened

#: what MNGD does if told nothing
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
    "fallback_lr": None,
    "fallback_betas": (0.9, 0.999),
    "fallback_eps": 1e-8,
}

#: options of a second group; an oracle is not told at which lr it has this fallback_lr
OTHER = {"lr": 3e-3, "fallback_lr": 6e-3}


def oracle(params, grads, options):
    ends, states = [], []
    for i, p in enumerate(params):
        steps = [{**DEFAULTS, **os[i]} for os in options]
        own = is_matrix(p.shape, steps[0]["stacks"])
        end, state = (matrix if own else fallback)(p, [gs[i] for gs in grads], steps)
        ends.append(end)
        states.append(state)
    return ends, states


def is_matrix(shape, stacks):
    return len(shape) == 2 or (len(shape) > 2 and stacks is not None)


def matrix(p, grads, options):
    """2502.06742, algorithm 2, for each matrix of a stack, with the momenta that MNGD's docstring says."""
    m = 0 * p
    for g, o in zip(grads, options, strict=True):
        mu = o["momentum"]
        if o["momentum_after"]:
            x = multi_norm_of_stack(g, o)
            m = m + (1 - mu) * (x - m)
            x = x + mu * (m - x) if o["nesterov"] else m
        else:
            m = mu * m + g
            x = multi_norm_of_stack(g + mu * m if o["nesterov"] else m, o)
        p = p - o["lr"] * (o["scale"] * x + o["weight_decay"] * p)
    return p, {"exp_avg": m} if mu else {}


def multi_norm_of_stack(z, o):
    if z.ndim > 2 and o["stacks"] == "conv":
        return multi_norm(z.reshape(z.shape[0], z[:1].size), o).reshape(z.shape)
    if z.ndim > 2:
        return np.stack([multi_norm(each, o) for each in z.reshape(-1, *z.shape[-2:])]).reshape(z.shape)
    return multi_norm(z, o)


def multi_norm(z, o):
    """Algorithm 1: x = z, then for l in 1 .. L, for each norm g: x = P_g(x)."""
    x = z
    for _ in range(o["iterations"]):
        for norm in o["norms"]:
            x = spectral(x, o) if norm == "spectral" else PROJECTIONS[norm](x, o["eps"] or 0.0)
    return x


def spectral(x, o):
    """The solver's iteration on the singular values, and its limit where o has no beta."""
    if o["beta"] is not None:
        return whitened(x, None, o["solver"], o["solver_iterations"], o["beta"])[0]
    u, _, v = np.linalg.svd(x, full_matrices=False)
    return u @ v * np.sqrt(max(x.shape))


def inverse(lengths, eps):
    """1 / max(length, eps), and 0 of nothing."""
    lengths = np.maximum(lengths, eps)
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)


PROJECTIONS = {
    "row": lambda x, eps: np.sqrt(x.shape[1]) * np.diag(inverse(np.sqrt((x**2).sum(1)), eps)) @ x,
    "col": lambda x, eps: np.sqrt(x.shape[0]) * x @ np.diag(inverse(np.sqrt((x**2).sum(0)), eps)),
    "frobenius": lambda x, eps: np.sqrt(x.size) * inverse(np.sqrt((x**2).sum(keepdims=True)), eps) * x,
    "sign": lambda x, eps: np.sign(x),
    "gradnorm": lambda x, eps: normalized(x, "gradnorm"),
}


def fallback(p, grads, options):
    """At lr * scale, or in the second group at lr times what its fallback_lr is in units of its lr."""
    steps = []
    for o in options:
        ratio = o["scale"] if o["fallback_lr"] is None else OTHER["fallback_lr"] / OTHER["lr"]
        own = {"lr": o["lr"] * ratio, "weight_decay": o["weight_decay"]}
        if o["fallback"] == "adamw":
            own |= {"betas": o["fallback_betas"], "eps": o["fallback_eps"]}
        if o["fallback"] == "adafactor":
            own |= {"relative_step": False, "scale_parameter": False}
        steps.append(own)
    if options[0]["fallback"] == "table":
        return table(p, grads, steps)
    rule = {"adamw": adamw, "adafactor": adafactor}[options[0]["fallback"]]
    ends, states = rule([p], [[g] for g in grads], [[o] for o in steps])
    return ends[0], states[0]


def table(p, grads, options):
    """DeepSeek-V4.1's update of tables, with 11 half-steps of which the first and last are rows."""
    m = 0 * p
    for g, o in zip(grads, options, strict=True):
        m = 0.9 * m + g
        x = (0.9 * m + g).reshape(-1, *(p.shape[-2:] if p.ndim >= 2 else (1, p.size)))
        for k, each in enumerate(x):
            norms = np.sqrt((each**2).sum(1))
            each = np.where((norms < 1e-3 * norms.mean())[:, None], 0, each)
            for half_step in range(1, 12):
                each = PROJECTIONS["row" if half_step % 2 else "col"](each, 0.0)
            x[k] = each
        p = p - o["lr"] * (0.18 * x.reshape(p.shape) + o["weight_decay"] * p)
    return p, {"exp_avg": m}


def state(fallback, momentum=None, stacks=None):
    """A case's `state`; ``momentum`` is "fp32" or "param" where there is one."""

    def of(shape, dtype):
        if is_matrix(shape, stacks):
            return {"exp_avg": (shape, torch.float32 if momentum == "fp32" else dtype)} if momentum else {}
        if fallback == "adafactor":
            return factors(shape)
        keys = ("exp_avg", "exp_avg_sq") if fallback == "adamw" else ("exp_avg",)
        return dict.fromkeys(keys, (shape, torch.float32))

    return of


def decay(scale, stacks=None):
    """A case's `decay`: each rule multiplies weight decay by its own rate."""
    return lambda param, lr: lr if is_matrix(param.shape, stacks) else lr * scale


WRONG = [
    ("iterations", 0),
    ("iterations", 2.0),
    ("iterations", True),
    ("scale", -0.1),
    ("scale", float("inf")),
    ("weight_decay", -0.1),
    ("weight_decay", None),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("nesterov", "yes"),
    ("momentum_after", 1),
    ("eps", 0.0),
    ("eps", "1e-8"),
    ("state_dtype", "bf16"),
]

WRONG_SOLVER = [
    ("solver", "svd"),
    ("solver", None),
    ("beta", 0.0),
    ("beta", 1.5),
    ("beta", float("nan")),
    ("beta", "0.5"),
]
