"""The rules in float64 NumPy, from the papers and docstrings. Nothing here looks at the code that is tested."""

import numpy as np

FP32_MAX = float(np.finfo(np.float32).max)


def transformed(grad, inv_scale=1.0, clip_value=None, clip_coef=1.0, maximize=False):
    """g = clamp(±inv_scale * grad, ±clip_value) * clip_coef, and which elements are finite before and after."""
    unscaled = np.float64(grad) * (-inv_scale if maximize else inv_scale)
    g = unscaled if clip_value is None else np.clip(unscaled, -clip_value, clip_value)
    g = g * clip_coef
    return g, (np.abs(unscaled) <= FP32_MAX) & (np.abs(g) <= FP32_MAX)


def adamw(p, g, m, v, t, *, lr, betas, eps, weight_decay):
    """One AdamW step (1711.05101, algorithm 2; the decay is multiplied by lr), t counting from 1: new (p, m, v)."""
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p), m, v


def adamw_error(p, g, m, v, t, *, lr, betas, eps, weight_decay):
    """How far fp32 arithmetic may be from `adamw`, for each element of (p, m, v), before the result is rounded.

    Units are 2**-24, half a spacing of fp32 relative to 1. m and v are sums of terms as large as the old value and the
    new one, in 3 operations: 4 units of the terms. v's terms are positive, so sqrt(v) is good to 4 units of itself. The
    update then has 6 more operations and 4 scalars that were rounded to fp32 (lr, corrections, eps): 16 units of
    the update that m's terms would make without cancelling. The decay term has 3 roundings,
    and p minus all that is an fp32 number before it is rounded to a narrower dtype.
    """
    unit = 2.0**-24
    beta1, beta2 = betas
    terms_m = np.abs(m) + np.abs(g)
    terms_v = beta2 * v + (1 - beta2) * g**2
    # where beta is 0 the old value must not matter
    terms_m = np.where(beta1 == 0, np.abs(g), terms_m)
    v_hat = terms_v / (1 - beta2**t)
    largest_update = lr * terms_m / (1 - beta1**t) / (np.sqrt(v_hat) + eps)
    error_p = 16 * largest_update + 4 * lr * weight_decay * np.abs(p) + np.abs(p)
    return error_p * unit, 4 * unit * terms_m, 4 * unit * (terms_v + (v if beta2 else 0)) + 2.0**-149


def scaled_update(p, g, *, lr, weight_decay):
    """LOMO (2306.09782) with its package's decoupled decay: (1 - lr weight_decay) p - lr g."""
    return (1 - lr * weight_decay) * p - lr * g


def scaled_update_error(p, g, *, lr, weight_decay):
    """As `adamw_error`: two products of rounded scalars, a sum, and p minus it."""
    return 2.0**-24 * (4 * np.abs(lr * g) + 4 * np.abs(lr * weight_decay * p) + np.abs(p))


def grad_stats(grads):
    """Sum of squares of all elements, and how many are NaN or Inf."""
    grads = list(grads)
    squares = sum(float(np.sum(np.float64(g) ** 2)) for g in grads)
    return squares, sum(int(np.sum(~np.isfinite(g))) for g in grads)


def mix32(word):
    """lowbias32 of Chris Wellons' hash prospector, on uint32 arrays kept in uint64: no overflow anywhere."""
    word = np.asarray(word, np.uint64)
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        word = ((word ^ (word >> np.uint64(shift))) * np.uint64(multiplier)) & np.uint64(0xFFFFFFFF)
    return word


def combine(key, word):
    """mix32((key ^ word) + golden ratio), modulo 2**32."""
    mixed = np.asarray(key, np.uint64) ^ np.asarray(word, np.uint64)
    return mix32((mixed + np.uint64(0x9E3779B9)) & np.uint64(0xFFFFFFFF))


def noise(seed, uid, step, stream, index):
    """The 16-bit noise of elements ``index`` (an int array) of tensor ``uid``, from the docstring of rounding.py."""
    key = np.uint64(0)
    for number in (seed % 2**64, uid % 2**64):
        key = combine(combine(key, number % 2**32), number // 2**32)
    key = combine(combine(key, step % 2**32), stream)
    index = np.asarray(index, np.uint64)
    pair = index // np.uint64(2)
    word = mix32((pair % np.uint64(2**32)) ^ combine(key, pair // np.uint64(2**32)))
    return np.where(index % np.uint64(2) == 0, word % np.uint64(2**16), word // np.uint64(2**16)).astype(np.uint32)


def to_bf16(x):
    """Nearest bfloat16 of an array, ties to even, as float64: the quotient by the spacing is exact, np.rint too."""
    x = np.float64(x)
    with np.errstate(invalid="ignore"):
        exponent = np.maximum(np.frexp(x)[1] - 1, -126)
        spacing = np.ldexp(1.0, exponent - 7)
        rounded = np.where(np.isfinite(x), np.rint(x / spacing) * spacing, x)
    return np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, x), rounded)


def to_bf16_stochastic(x, noise16):
    """fp32 ``x`` as bfloat16 in float32: away from zero with the probability of the distance, in units of 2**-16."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + noise16) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)
