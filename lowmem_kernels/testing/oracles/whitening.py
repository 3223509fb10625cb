"""Whitening in float64 NumPy, from the papers. No reference and no kernel is used.

Solvers are polynomials in the Gram matrix, so they act on each eigenvalue by itself: a recurrence of numbers, on the
squared singular values of X. What is small stays accurate, since no Gram matrix is formed.
"""

from __future__ import annotations

import numpy as np

from .types import Array

#: A backward error of fp32 arithmetic, of the Gram matrix's Frobenius norm: four roundings of 2**-24.
BACKWARD = 2.0**-22


def matrices(x: Array, conv: bool = False) -> Array:
    """[E, m, n]: the last two dimensions are a matrix, or all but the first are columns."""
    return x.reshape(1, len(x), -1) if conv else x.reshape(-1, *x.shape[-2:])


def normalized(g: Array, normalize: str | None) -> Array:
    """GradNorm (2412.13148, algorithm 1), or rows over their root mean square, or g itself. 0/0 is 0."""
    if normalize is None:
        return np.asarray(g, np.float64)
    x = np.asarray(g, np.float64)
    if normalize == "gradnorm":
        constant = (x == x[:, :1]).all(1, keepdims=True)  # whose mean float64 may miss by a rounding error
        x = np.where(constant, 0.0, x - x.mean(1, keepdims=True))
    size = np.sqrt((x**2).mean(1, keepdims=True))
    return np.divide(x, size, out=np.zeros_like(x), where=size > 0)


def inverse_roots(y: Array, solver: str, iterations: int | None, beta: float) -> Array:
    """What the solver makes of eigenvalues ``y`` of a Gram matrix of Frobenius norm 1: about 1 / sqrt(y)."""
    z = np.ones_like(y)
    if solver == "coupled":
        for _ in range(iterations or 10):
            t = 3 - z * y
            y, z = beta * y * t, beta * t * z
    else:
        for _ in range(iterations or 5):
            t = 3.4445 - 4.7750 * y + 2.0315 * y * y
            y, z = y * t * t, z * t
    return z


def whitened(
    g: Array,
    normalize: str | None = "gradnorm",
    solver: str = "coupled",
    iterations: int | None = None,
    beta: float = 0.8,
) -> tuple[Array, float]:
    """(D, error): D of one matrix, and about how far, relative to it in Frobenius norm, fp32 arithmetic is from it.

    The error is what a backward error E of the Gram matrix makes of D. In the basis of its eigenvectors Z = f(S) moves
    by E_ij (f(y_i) - f(y_j)) / (y_i - y_j) (Daleckii and Krein). With beta = 0.8 that is next to nothing where singular
    values are alike, and large where they span decades, or where f is large because there is nothing: f(0) = 6000.
    """
    x = normalized(g, normalize)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    norm = np.sqrt(np.sum(s**4))
    if norm == 0:
        return np.zeros_like(x), 0.0
    y = s**2 / norm
    z = inverse_roots(y, solver, iterations, beta)
    size = np.linalg.norm(z * s)
    d = (u * (z * s * np.sqrt(x.size) / size)) @ v
    if normalize == "gradnorm" and x.shape[0] >= x.shape[1]:
        y[-1] = y.mean()  # the vector of ones, out of harm's way
        z = inverse_roots(y, solver, iterations, beta)
    # a distance as large as the error itself, so that neighbours are a difference and no quotient of rounding errors
    entry = BACKWARD / len(y)
    apart = y[:, None] - y[None, :]
    far = np.abs(apart) > BACKWARD
    slope = np.abs(inverse_roots(y + BACKWARD, solver, iterations, beta) - z) / BACKWARD
    quotients = np.divide(z[:, None] - z[None, :], apart, out=np.tile(slope, (len(y), 1)), where=far)
    moved = entry * np.linalg.norm(quotients * s[None, :])
    # and of the norm, which is taken as the root of tr Z S Z
    rescaled = entry * norm * np.linalg.norm(z**2) / 2
    return d, moved / size + rescaled / size**2


def polar(g: Array, normalize: str | None = "gradnorm") -> Array:
    """(X X^T)^(-1/2) X, of root mean square 1."""
    x = normalized(g, normalize)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    whole = s > 1e-10 * s[0]
    return (u[:, whole] @ v[whole]) * np.sqrt(x.size / whole.sum())


def update(p: Array, d: Array, *, lr: float, scale: float, weight_decay: float) -> Array:
    """p - lr (scale D + weight_decay p)."""
    return p - lr * (scale * d + weight_decay * p)
