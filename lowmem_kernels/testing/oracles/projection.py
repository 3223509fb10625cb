"""APOLLO in float64 NumPy: 2412.05270, algorithm 1, in the order of operations of the authors' implementation.

Projections are given: those that `projection_matrix` says. Matrices have channels as columns, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...projection import Draw, projection_matrix
from .multinorm import DEFAULTS as FALLBACK
from .multinorm import fallback, is_matrix
from .types import AllGrads, AllOptions, Array, End, Options, State

#: Half a spacing of fp32 at 1.
U = 2.0**-24

#: What APOLLO does if told nothing, and what APOLLO-Mini does where that is something else.
DEFAULTS = {
    "rank": 256,
    "scale": 1.0,
    "scale_type": "channel",
    "update_proj_gap": 200,
    "proj_type": "std",
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.0,
    "disable_nl": False,
    "source": "gaussian",
}
MINI = {"rank": 1, "scale": 128.0, "scale_type": "tensor"}


def is_right(shape: tuple[int, ...], proj_type: str) -> bool:
    """Whether a matrix is multiplied by the projection from the right."""
    m, n = shape
    return proj_type == "right" or (proj_type != "left" and (m >= n) == (proj_type == "std"))


def step(
    w: Array, g: Array, first: Array, second: Array, last: float, t: int, project: Array, o: Options
) -> tuple[Array, Array, Array, float]:
    """One step: (parameter, moments, norm of the update before lr, and the scales of channels)."""
    beta1, beta2 = o["betas"]
    r = project @ g
    first = beta1 * first + (1 - beta1) * r
    second = beta2 * second + (1 - beta2) * r**2
    normalized = first / (np.sqrt(second) + o["eps"])
    axis = None if o["scale_type"] == "tensor" else 0
    s = np.sqrt((normalized**2).sum(axis)) / (np.sqrt((r**2).sum(axis)) + 1e-8)
    x = np.sqrt(o["scale"]) * g * s if o.get("scale_front") else g * s
    norm = np.sqrt((x**2).sum())
    if not o["disable_nl"] and last >= 1e-6 and np.isfinite(last):
        limiter = max(norm / (last + 1e-8), 1.01) / 1.01
        x, norm = x / limiter, norm / limiter
    if not o.get("scale_front"):
        x = np.sqrt(o["scale"]) * x
    w = w - o["lr"] * np.sqrt(1 - beta2**t) / (1 - beta1**t) * x
    w = w - o["lr"] * o["weight_decay"] * w
    return w, first, second, norm


def step_error(
    w: Array, g: Array, first: Array, second: Array, t: int, project: Array, o: Options, new: Sequence[Array]
) -> tuple[Array, Array, Array]:
    """How far fp32 may be from each of the first three results ``new``: sums, then what is made of them."""
    beta1, beta2 = o["betas"]
    r, sums = project @ g, 16 * U * np.abs(project) @ np.abs(g)
    first_error = (1 - beta1) * sums + 4 * U * np.abs(new[1]) + U * np.abs(first)
    second_error = (1 - beta2) * 2 * np.abs(r) * sums + 4 * U * new[2] + U * second
    root = np.sqrt(new[2])
    normalized = new[1] / (root + o["eps"])
    error = first_error + np.abs(new[1]) * ratio(second_error, 2 * root * (root + o["eps"]))
    error = error / (root + o["eps"]) + 4 * U * np.abs(normalized)
    axis = None if o["scale_type"] == "tensor" else 0

    def size(x: Array) -> Array:
        return np.sqrt((x**2).sum(axis))

    relative = ratio(size(error), size(normalized)) + ratio(size(sums), size(r)) + 16 * U
    # the limit passes the error of the norm, at most that of the worst channel, on to all
    relative = relative + np.max(relative, initial=0.0)
    # the update without the decay, which can cancel with it
    update = np.abs(new[0] - w) + o["lr"] * o["weight_decay"] * np.abs(w)
    return relative * update + 8 * U * np.abs(w), first_error, second_error


def ratio(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is."""
    return np.divide(x, y, out=np.zeros(np.broadcast(x, y).shape), where=np.asarray(y) > 0)


def matrix(
    p: Array, grads: Sequence[Array], options: Sequence[Options], uid: int, steps: Sequence[int] | None = None
) -> tuple[Array, State]:
    """All steps of one matrix: (parameter, state) at the end.

    ``steps``: the steps of the parameter's group at which there are gradients, where it had not one in each.
    """
    o = options[0]
    right = is_right(p.shape, o["proj_type"])

    def turn(x: Array) -> Array:
        return x.T if right else x

    w, first, second, last, epoch = turn(p), np.zeros(()), np.zeros(()), 0.0, 0
    for k, (g, o) in enumerate(zip(grads, options, strict=True)):
        epoch = (k if steps is None else steps[k]) // o["update_proj_gap"] + 1
        draw = Draw(o["source"], uids=[uid], epoch=epoch)
        project = projection_matrix(p.shape, rank=o["rank"], draw=draw, proj_type=o["proj_type"]).double().numpy()
        w, first, second, last = step(w, turn(g), first, second, last, k + 1, project, o)
    state = {"exp_avg": turn(first), "exp_avg_sq": turn(second), "update_norm": np.array(last)}
    return turn(w), state | {"epoch": np.array(float(epoch))}


def stack(
    p: Array, grads: Sequence[Array], options: Sequence[Options], uid: int = 0, steps: Sequence[int] | None = None
) -> tuple[Array, State]:
    """Each matrix of a stack by itself."""
    if p.ndim == 2 or options[0]["stacks"] == "conv":
        flat = (len(p), math.prod(p.shape[1:]))
        end, state = matrix(p.reshape(flat), [g.reshape(flat) for g in grads], options, uid, steps)
        if p.ndim > 2 and state["exp_avg"].shape == end.shape:  # not projected
            state |= {key: state[key].reshape(p.shape) for key in ("exp_avg", "exp_avg_sq")}
        return end.reshape(p.shape), state
    pairs = [stack(p[e], [g[e] for g in grads], options, uid, steps) for e in range(len(p))]
    keys = ("exp_avg", "exp_avg_sq", "update_norm")
    state = {key: np.stack([each[key] for _, each in pairs]) for key in keys} | {"epoch": pairs[0][1]["epoch"]}
    return np.stack([end for end, _ in pairs]), state


def apollo(
    params: Sequence[Array],
    grads: AllGrads,
    options: AllOptions,
    uids: Sequence[int] | None = None,
    defaults: Options = DEFAULTS,
) -> End:
    """APOLLO for matrices and the fallback, at lr or lr times fallback_ratio, for the rest.

    ``uids``: numbers that the projections of the parameters are drawn from; None: their positions.
    """
    ends, states = [], []
    for i, p in enumerate(params):
        steps = [{**FALLBACK, **defaults, **os[i]} for os in options]
        own = [gs[i] for gs in grads]
        if is_matrix(p.shape, steps[0]["stacks"]):
            end, state = stack(p, own, steps, uid=i if uids is None else uids[i])
        else:
            end, state = fallback(p, own, [{**o, "scale": 1.0} for o in steps])
        ends.append(end)
        states.append(state)
    return ends, states


def apollo_mini(
    params: Sequence[Array], grads: AllGrads, options: AllOptions, uids: Sequence[int] | None = None
) -> End:
    """As `apollo`, with rank 1 and one scale for a matrix, whatever the options say."""
    fixed = [[{**o, "rank": 1, "scale_type": "tensor"} for o in os] for os in options]
    return apollo(params, grads, fixed, uids, {**DEFAULTS, **MINI})
