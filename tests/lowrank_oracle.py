"""Partial momentum in float64 NumPy, from the definitions: A, M and the residual are made. Nothing sees the code."""

import numpy as np

#: Of "gd", half of a power step.
DAMPING = {"power": 1.0, "fixed": 1.0, "gd": 0.5}


def least_squares(left, a):
    """The R that makes |left R - a|² least, with 0 in the rows of columns that depend on others."""
    return np.linalg.lstsq(left, a, rcond=1e-9)[0]


def follow(left, right, a, t, solver="power", refresh=50):
    """(L, R), R with orthonormal rows, whose product follows ``a``: one step of the solver from those before."""
    if solver == "fixed" and (t - 1) % refresh:
        return a @ right.T, right
    damping = 1.0 if t == 1 else DAMPING[solver]
    new_left = (1 - damping) * left + damping * a @ right.T
    new_right = (1 - damping) * right + damping * least_squares(new_left, a)
    q, upper = np.linalg.qr(new_right.T)
    return new_left @ upper.T, q.T


def momentum_of(left, right, g, t, beta, gamma=1.0, solver="power", refresh=50):
    """(U, L, R) of one matrix: the debiased momentum of 2510.09103's error feedback, as docs/optimizers/adapm.md."""
    a = beta * left @ right + (1 - beta) * g
    left, right = follow(left, right, a, t, solver, refresh)
    m = left @ right
    return m / (1 - beta**t) + gamma * (a - m) / (1 - beta), left, right


def second_moment(v, g, beta2, second, groups=None):
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


def normalized(u, v, t, beta2, eps):
    """U / (sqrt(v̂) + eps); 0 where no gradient has been."""
    return np.where(v == 0, 0.0, u / (np.sqrt(v / (1 - beta2**t)) + eps))


def clipped(x, clip):
    """The update after update_clip."""
    if clip is None or x.size == 0:
        return x
    kind, bound = clip
    return np.clip(x, -bound, bound) if kind == "elem" else x / max(1.0, np.sqrt((x**2).mean()) / bound)
