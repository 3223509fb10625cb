"""Partial momentum in float64 NumPy, from the definitions: A, M and the residual are made.

No reference and no kernel is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .types import AllGrads, AllOptions, Array, End

#: Of "gd", half of a power step.
DAMPING = {"power": 1.0, "fixed": 1.0, "gd": 0.5}

#: What AdaPM does if told nothing, with policy="lowrank".
ADAPM = {
    "rank": 16,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "second_moment": "adam",
    "update_clip": ("elem", 3.0),
    "solver": "power",
    "refresh": 50,
    "residual_scale": 1.0,
}
#: What AdamMini does if told nothing.
ADAMMINI = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def least_squares(left: Array, a: Array) -> Array:
    """The R that makes |left R - a|² least, with 0 in the rows of columns that depend on others."""
    return np.linalg.lstsq(left, a, rcond=1e-9)[0]


def follow(
    left: Array, right: Array, a: Array, t: int, solver: str = "power", refresh: int = 50
) -> tuple[Array, Array]:
    """(L, R), R with orthonormal rows, whose product follows ``a``: one step of the solver from those before."""
    if solver == "fixed" and (t - 1) % refresh:
        return a @ right.T, right
    damping = 1.0 if t == 1 else DAMPING[solver]
    new_left = (1 - damping) * left + damping * a @ right.T
    new_right = (1 - damping) * right + damping * least_squares(new_left, a)
    q, upper = np.linalg.qr(new_right.T)
    return new_left @ upper.T, q.T


def momentum_of(
    left: Array,
    right: Array,
    g: Array,
    t: int,
    beta: float,
    gamma: float = 1.0,
    solver: str = "power",
    refresh: int = 50,
) -> tuple[Array, Array, Array]:
    """(U, L, R) of one matrix: the debiased momentum of 2510.09103's error feedback, as docs/optimizers/adapm.md."""
    a = beta * left @ right + (1 - beta) * g
    left, right = follow(left, right, a, t, solver, refresh)
    m = left @ right
    return m / (1 - beta**t) + gamma * (a - m) / (1 - beta), left, right


def second_moment(v: Any, g: Array, beta2: float, second: str) -> tuple[Any, Array]:
    """New v, and it spread over all elements. ``v`` is an array, or a pair of rows and columns for "factored"."""
    rows = g.reshape(-1, g.shape[-1]) if g.ndim >= 2 else g.reshape(1, -1)
    if second == "element":
        v = beta2 * v + (1 - beta2) * g**2
        return v, v
    if second == "rows":
        means = (rows**2).reshape(v.size, -1).mean(1)
        v = beta2 * v + (1 - beta2) * means
        return v, np.repeat(v, len(rows) // v.size)[:, None].repeat(rows.shape[1], 1).reshape(g.shape)
    if second == "cols":
        stack = int(np.prod(g.shape[:-2]))
        size = stack * g.shape[-1] // v.size
        means = (g**2).mean(-2).reshape(v.size, size).mean(1)
        v = beta2 * v + (1 - beta2) * means
        each = np.repeat(v, size).reshape(*g.shape[:-2], 1, g.shape[-1])
        return v, np.broadcast_to(each, g.shape)
    r, c = v
    if g.size == 0:
        return v, g
    r = beta2 * r + (1 - beta2) * (g**2).mean(-1)
    c = beta2 * c + (1 - beta2) * (g**2).mean(-2)
    mean = r.mean(-1, keepdims=True)
    share = np.divide(r, mean, out=np.zeros_like(r), where=mean > 0)
    return (r, c), share[..., None] * c[..., None, :]


def normalized(u: Array, v: Array, t: int, beta2: float, eps: float) -> Array:
    """U / (sqrt(v̂) + eps); 0 where no gradient has been."""
    return np.where(v == 0, 0.0, u / (np.sqrt(v / (1 - beta2**t)) + eps))


def clipped(x: Array, clip: tuple[str, float] | None) -> Array:
    """The update after update_clip."""
    if clip is None or x.size == 0:
        return x
    kind, bound = clip
    return np.clip(x, -bound, bound) if kind == "elem" else x / max(1.0, np.sqrt((x**2).mean()) / bound)


def adapm(
    params: Sequence[Array], grads: AllGrads, options: AllOptions, starting_rows: Callable[[int, int], Array]
) -> End:
    """AdaPM (2510.09103, as docs/optimizers/adapm.md reconstructs it) with policy="lowrank", each matrix by itself.

    ``starting_rows``: (rank, columns) -> what momentum looks along before it sees a gradient, a random choice.
    Factors are no part of the states: they are compared by what they make of the parameter.
    """
    ends, states = [], []
    for i, p in enumerate(params):
        o = {**ADAPM, **options[0][i]}
        low = p.ndim in (2, 3) and p.size > 0
        factored = o["second_moment"] == "factored" and p.ndim >= 2
        v: Any = (np.zeros(p.shape[:-1]), np.zeros((*p.shape[:-2], *p.shape[-1:]))) if factored else 0 * p
        stack = p.reshape(-1, *p.shape[-2:]) if low else p
        rank = min(o["rank"], *p.shape[-2:]) if low else 0
        start = (np.zeros((p.shape[-2], rank)), starting_rows(rank, p.shape[-1])) if low else (p, p)
        factors = [start] * len(stack) if low else []
        m = 0 * p
        for t in range(1, len(grads) + 1):
            o = {**ADAPM, **options[t - 1][i]}
            beta1, beta2 = o["betas"]
            g = grads[t - 1][i]
            if low:
                found = [
                    momentum_of(left, right, x, t, beta1, o["residual_scale"], o["solver"], o["refresh"])
                    for (left, right), x in zip(factors, g.reshape(stack.shape), strict=True)
                ]
                u = np.stack([each[0] for each in found]).reshape(p.shape)
                factors = [(left, right) for _, left, right in found]
            else:
                m = beta1 * m + (1 - beta1) * g
                u = m / (1 - beta1**t)
            v, spread = second_moment(v, g, beta2, "factored" if factored else "element")
            x = clipped(normalized(u, spread, t, beta2, o["eps"]), o["update_clip"])
            p = p - o["lr"] * (x + o["weight_decay"] * p)
        ends.append(p)
        moments = {"exp_avg_sq_row": v[0], "exp_avg_sq_col": v[1]} if factored else {"exp_avg_sq": v}
        states.append(moments if p.ndim in (2, 3) else {**moments, "exp_avg": m})
    return ends, states


def rows_of(shape: tuple[int, ...]) -> int:
    """How many second moments Adam-mini has without names: rows of matrices, outputs of convolutions, whole vectors."""
    if 0 in shape:
        return 0
    return 1 if len(shape) < 2 else shape[0] if len(shape) == 4 else int(np.prod(shape[:-1]))


def adammini(params: Sequence[Array], grads: AllGrads, options: AllOptions) -> End:
    """Adam-mini, 2406.16793, with the second moments of `rows_of`."""
    ends, states = [], []
    for i, p in enumerate(params):
        m, v = 0 * p, np.zeros(rows_of(p.shape))
        for t in range(1, len(grads) + 1):
            o = {**ADAMMINI, **options[t - 1][i]}
            beta1, beta2 = o["betas"]
            g = grads[t - 1][i]
            m = beta1 * m + (1 - beta1) * g
            if g.size:
                v, spread = second_moment(v, g, beta2, "rows")
                x = normalized(m / (1 - beta1**t), spread, t, beta2, o["eps"])
                p = p - o["lr"] * (x + o["weight_decay"] * p)
        ends.append(p)
        states.append({"exp_avg": m, "exp_avg_sq_row": v})
    return ends, states
