"""Adafactor in its dialects and CAME in float64 NumPy, from the papers. Nothing here looks at the code that is tested.

The second moment V is formed in full, the gradient divided by its root, and RMS taken of all of that. What a step
writes is a dict from the name of the list to the array; a factor that does not exist is None.
"""

import numpy as np

UNIT = 2.0**-24
#: Units that a sum of 2**16 nonnegative terms may be off by: in pairs each of them is in 16 additions.
SUM = 16


def rms(x):
    return np.sqrt(np.mean(x**2))


def scheduled(rule, lr, t):
    """Step length at update t, before it is scaled by the parameter."""
    return {"constant": lr, "rsqrt": min(lr, t**-0.5), "warmup": min(lr * t, t**-0.5)}[rule.lr_schedule]


def weight_of_new(rule, t):
    """1 - beta2 at update t."""
    return t**rule.decay_rate if rule.beta2 is None else 1 - rule.beta2


def second_moments(q, row, col, weight):
    """Moving averages of the means of q's rows and columns, for each matrix; of q itself below two dimensions."""
    if q.ndim < 2:
        return (1 - weight) * row + weight * q, None
    return (1 - weight) * row + weight * q.mean(-1), (1 - weight) * col + weight * q.mean(-2)


def estimate(row, col, floor=0.0, mean_of=None):
    """V = R C / mean(R), for each matrix, with mean(R) at least ``floor`` and V at least its square."""
    if col is None:
        return np.maximum(row, floor**2)
    mean = np.maximum((row if mean_of is None else mean_of).mean(-1), floor)
    return np.maximum(row[..., :, None] * col[..., None, :] / mean[..., None, None], floor**2)


def clipped(u, threshold):
    """u, scaled down to an RMS of ``threshold`` if it is larger."""
    return u / max(1.0, rms(u) / threshold)


def factored(p, g, row, col, m, t, *, lr, weight_decay, rule):
    """One step of Adafactor (1804.04235, algorithms 4 and 5) in the dialect of ``rule``, t counting from 1."""
    eps1, eps2 = rule.eps
    row, col = second_moments(g**2 + (0 if rule.eps_floor else eps1), row, col, weight_of_new(rule, t))
    u = clipped(g / np.sqrt(estimate(row, col, eps1 if rule.eps_floor else 0.0)), rule.clip_threshold)
    rate = scheduled(rule, lr, t) * (max(eps2, rms(p)) if rule.scale_parameter else 1)
    update = rate * u
    if rule.beta1 is not None:
        update = m = rule.beta1 * m + (1 - rule.beta1) * update
    decay = weight_decay * (rate if rule.scale_decay else lr)
    return {"params": p - update - decay * p, "exp_avgs": m, "rows": row, "cols": col}


def came(p, g, m, row, col, res_row, res_col, *, lr, betas, eps, clip_threshold, weight_decay, stored=None):
    """One step of CAME (2307.02047, algorithm 2) with decoupled weight decay.

    ``stored``: the new momentum as it was rounded, if it was, because that is what p moves by.
    """
    beta1, beta2, beta3 = betas
    row, col = second_moments(g**2 + eps[0], row, col, 1 - beta2)
    u = clipped(g / np.sqrt(estimate(row, col)), clip_threshold)
    m = beta1 * m + (1 - beta1) * u
    update = m if stored is None else stored
    if p.ndim >= 2:
        res_row, res_col = second_moments((u - m) ** 2 + eps[1], res_row, res_col, 1 - beta3)
        update = update / np.sqrt(estimate(res_row, res_col))
    written = {"params": p - lr * update - lr * weight_decay * p, "exp_avgs": m, "rows": row, "cols": col}
    return {**written, "res_rows": res_row, "res_cols": res_col}


def moments_error(q, q_error, row, col, weight, weight_units):
    """How far fp32 may be from `second_moments`, q being off by ``q_error`` and the weight by that many units.

    A mean is a sum and a division. The average is a sum of terms as large as the old value and the new one, in 3
    operations, and the old value must not matter where the weight is 1. The last summand is fp32's smallest number.
    """

    def averaged(old, new, new_error):
        if weight == 1:
            old = 0
        return UNIT * (4 * (weight * new + old) + weight_units * weight * (new + old)) + weight * new_error + 2.0**-149

    if q.ndim < 2:
        return averaged(row, q, q_error), None
    means = [(q.mean(axis), q_error.mean(axis)) for axis in (-1, -2)]
    errors = [(mean, error + (SUM + 1) * UNIT * mean) for mean, error in means]
    return averaged(row, *errors[0]), averaged(col, *errors[1])


def inverse_root_error(row, col, row_error, col_error, floor=0.0):
    """How far fp32 may be from 1 / sqrt(V), relative to it, for factors off by as much as stated.

    V is at least what the factors' lower ends make with the upper end of mean(R). Then 16 units for two divisions, two
    reciprocal roots of 2 spacings each (what GPUs promise), two products and the floor's own rounding.
    """
    if col is None:
        low = estimate(row - row_error, None, floor)
    else:
        largest = (row + row_error) * (1 + (SUM + 1) * UNIT)
        low = estimate(row - row_error, col - col_error, floor, largest)
    return np.sqrt(estimate(row, col, floor) / low) - 1 + 16 * UNIT


def clipped_error(u, error, threshold):
    """How far fp32 may be from `clipped`, u being off by ``error``.

    RMS is a norm: it is off by at most the RMS of the errors, by two nested sums and a few operations. Two operations
    make the quotient.
    """
    length = rms(u)
    relative = rms(error) / length + (SUM + 8) * UNIT if length > 0 else 0.0
    scale = max(1.0, length / threshold)
    clips = length * (1 + relative) > threshold
    return error / scale + np.abs(u) / scale * (relative * clips + 2 * UNIT)


def factored_error(p, g, row, col, m, t, *, lr, weight_decay, rule):
    """How far fp32 arithmetic may be from `factored`, before results are rounded; units are 2**-24.

    g has 2 roundings, so q has 4, that of the square and that of the sum with a rounded eps1: 8. The weight
    t**decay_rate is exp(decay_rate ln t) in fp32 at worst, whose exponent has 2 roundings. The rate has lr, a root, a
    product, and RMS(p), half of a sum and a few: 8 + 12. p minus the rest is an fp32 number before it is rounded
    further.
    """
    weight = weight_of_new(rule, t)
    weight_units = 2 if rule.beta2 is not None or t == 1 else 2 + 2 * abs(rule.decay_rate) * np.log(t)
    eps1, floor = (0.0, rule.eps[0]) if rule.eps_floor else (rule.eps[0], 0.0)
    q = g**2 + eps1
    row_error, col_error = moments_error(q, 8 * UNIT * q, row, col, weight, weight_units)
    rows, cols = second_moments(q, row, col, weight)
    u = g / np.sqrt(estimate(rows, cols, floor))
    u_error = np.abs(u) * (inverse_root_error(rows, cols, row_error, col_error, floor) + 3 * UNIT)
    rate = scheduled(rule, lr, t) * (max(rule.eps[1], rms(p)) if rule.scale_parameter else 1)
    update = np.abs(rate * clipped(u, rule.clip_threshold))
    error = rate * clipped_error(u, u_error, rule.clip_threshold) + 20 * UNIT * update
    m_error = None
    if rule.beta1 is not None:
        old = np.abs(m) if rule.beta1 else 0 * m
        m_error = error = (1 - rule.beta1) * error + 4 * UNIT * (old + update)
        update = rule.beta1 * old + (1 - rule.beta1) * update
    decay = np.abs(weight_decay * (rate if rule.scale_decay else lr) * p)
    p_error = error + UNIT * (update + 22 * decay + np.abs(p))
    return {"params": p_error, "exp_avgs": m_error, "rows": row_error, "cols": col_error}


def came_error(p, g, m, row, col, res_row, res_col, *, lr, betas, eps, clip_threshold, weight_decay, stored=None):
    """How far fp32 arithmetic may be from `came`, as `factored_error`. What was stored is exact.

    The residual u - m is off by the errors of both, whatever is left of it, and its square by twice that times it.
    """
    beta1, beta2, beta3 = betas
    q = g**2 + eps[0]
    row_error, col_error = moments_error(q, 8 * UNIT * q, row, col, 1 - beta2, 2)
    rows, cols = second_moments(q, row, col, 1 - beta2)
    u = g / np.sqrt(estimate(rows, cols))
    u_error = np.abs(u) * (inverse_root_error(rows, cols, row_error, col_error) + 3 * UNIT)
    u, u_error = clipped(u, clip_threshold), clipped_error(u, u_error, clip_threshold)
    new = beta1 * m + (1 - beta1) * u
    error = m_error = (1 - beta1) * u_error + 4 * UNIT * ((np.abs(m) if beta1 else 0) + np.abs(u))
    error, update = (error, np.abs(new)) if stored is None else (0 * error, np.abs(stored))
    errors = {"exp_avgs": m_error, "rows": row_error, "cols": col_error, "res_rows": None, "res_cols": None}
    if p.ndim >= 2:
        d_error = u_error + m_error + UNIT * (np.abs(u) + np.abs(new))
        s = (u - new) ** 2 + eps[1]
        s_error = 2 * np.abs(u - new) * d_error + d_error**2 + 3 * UNIT * s
        res_errors = moments_error(s, s_error, res_row, res_col, 1 - beta3, 2)
        res_rows, res_cols = second_moments(s, res_row, res_col, 1 - beta3)
        root = np.sqrt(estimate(res_rows, res_cols))
        update = update / root
        error = error / root + update * inverse_root_error(res_rows, res_cols, *res_errors)
        errors.update(res_rows=res_errors[0], res_cols=res_errors[1])
    p_error = lr * error + UNIT * (6 * lr * update + 4 * lr * weight_decay * np.abs(p) + np.abs(p))
    return {"params": p_error, **errors}
