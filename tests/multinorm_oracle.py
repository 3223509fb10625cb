"""Multi-normalization in float64 NumPy, literally as in the papers: every norm divides a whole matrix again.

Nothing here looks at the code that is tested: no scale vectors, no skipped half-steps.
"""

import math

import numpy as np


def as_matrices(x, conv):
    """[E, n, m]: a stack over the last two dimensions, or one matrix of the first against all others; one row below."""
    if x.ndim < 2:
        return x.reshape(1, 1, x.size)
    if conv:
        return x.reshape(1, len(x), math.prod(x.shape[1:]))
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def divided(x, norm):
    """x / norm, 0 where the norm is."""
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)


def normalized(x, norm, eps):
    """One norm of one matrix n x m (2502.06742, algorithm 1 with the projections of its norms)."""
    n, m = x.shape
    if norm == "sign":
        return np.sign(x)
    axis, size = {"row": (1, m), "col": (0, n), "frobenius": (None, n * m)}[norm]
    length = np.sqrt((x**2).sum(axis, keepdims=True))
    if eps is not None:
        length = np.where(length > 0, np.maximum(length, eps), 0.0)
    return np.sqrt(size) * divided(x, length)


def multinorm(g, rule):
    """X of a gradient of any shape."""
    stacked = as_matrices(np.asarray(g, np.float64), rule.conv)
    result = np.empty_like(stacked)
    for i, x in enumerate(stacked):
        if rule.row_threshold and x.size:
            norms = np.sqrt((x**2).sum(1, keepdims=True))
            x = np.where(norms < rule.row_threshold * norms.mean(), 0.0, x)
        for norm in rule.norms:
            x = normalized(x, norm, rule.eps) if x.size else x
        result[i] = x
    return result.reshape(np.shape(g))


def step(p, g, m, rule, lr, weight_decay):
    """(p, momentum) after one update."""
    mu = rule.momentum
    if not mu:
        x = multinorm(g, rule)
    elif rule.momentum_after:
        x = multinorm(g, rule)
        m = mu * m + (1 - mu) * x
        x = (1 - mu) * x + mu * m if rule.nesterov else m
    else:
        m = mu * m + g
        x = multinorm(g + mu * m if rule.nesterov else m, rule)
    return np.asarray(p - lr * (rule.scale * x + weight_decay * p)), np.asarray(m)


#: What two scale vectors in fp32 may be off by, relative to each element: sums of squares are off by a few units of
#: 2**-24, each half-step takes over the error of the one before, and errors of opposite half-steps cancel. Measured: at
#: most 7e-7.
FACTORED = 2e-6
UNIT = 2.0**-24


def step_error(p, g, m, rule, lr, weight_decay):
    """How far fp32 arithmetic may be from `step`, for each element of (p, momentum), before the result is rounded.

    The update by what its scale vectors are, and where a momentum cancels with the gradient by two units of the terms;
    then a few operations with one unit each.
    """
    new_p, new_m = step(p, g, m, rule, lr, weight_decay)
    mu = rule.momentum
    update = lr * rule.scale * np.abs(multinorm(g, rule))
    terms = np.zeros_like(update)
    if mu and rule.momentum_after:
        m_error = FACTORED * update / (lr * rule.scale) + 4 * UNIT * (np.abs(m) + update / (lr * rule.scale))
        update = update + lr * rule.scale * (np.abs(m) + np.abs(new_m))
    elif mu:
        x = g + mu * new_m if rule.nesterov else new_m
        scaled = np.abs(multinorm(x, rule))
        update = lr * rule.scale * scaled
        terms = 4 * UNIT * lr * rule.scale * divided(scaled, np.abs(x)) * (np.abs(g) + 2 * np.abs(m))
        m_error = 2 * UNIT * (np.abs(g) + np.abs(m))
    else:
        m_error = np.zeros_like(update)
    decay = lr * weight_decay * np.abs(p)
    return FACTORED * update + terms + 4 * UNIT * (update + decay + np.abs(new_p)), m_error
