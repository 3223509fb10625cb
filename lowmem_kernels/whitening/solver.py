"""Approximate inverse roots of many Gram matrices at once: the part that is nothing but products of small matrices.

    S_BKK   Gram matrices of X, fp32, K = min(m, n) of them by K
    Z_BKK   approximately (S / c)^(-1/2), for some c > 0 that the last rescaling removes

Both implementations of the verbs use it. Products go through torch.bmm: they are where the arithmetic is, and what a
vendor's library is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .rule import WhiteningRule

#: Jordan's quintic a x + b x³ + c x⁵ (Muon): five steps take all of [0.01, 1] to about 0.7 .. 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)

#: K x K matrices that are alive at a time, for each Gram matrix: itself, two iterates, a factor, a spare one.
BUFFERS = 5

#: Smallest normal fp32 number: a sum of squares below it counts as zero, as it does for a GPU's approximate root.
TINY = 2.0**-126


def inverse_root(gram: Tensor, rule: WhiteningRule, lift: bool) -> tuple[Tensor, Tensor]:
    """Return (Z, 1 / ||Z X||_F) of the Gram matrices ``gram`` [B, K, K] of X, fp32; ``gram`` is overwritten.

    ``lift`` says that X has the vector of ones in its null space, as a matrix of centred rows has on the right. The
    solver multiplies small eigenvalues by up to 2.4 in each step, those that are nothing but rounding errors included.
    So the eigenvalue is moved from 0 to the mean of all, where nothing happens to it; X Z does not notice.

    Gram matrices of zeros give an inverse norm of 0, those that are not finite give NaN.
    """
    # at first by the trace: the squares of the Frobenius norm could overflow
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    unit = torch.where(trace < TINY, 0.0 * trace, 1 / trace)
    gram.mul_(unit[:, None, None])
    norm = torch.linalg.vector_norm(gram, dim=(1, 2))
    inverse = torch.where(norm < TINY, norm, 1 / norm)
    start = gram * inverse[:, None, None]
    if lift:
        start.add_((inverse / gram.shape[1] ** 2)[:, None, None])
    exact = rule.solver == "coupled"
    with products_in(exact):
        root = _coupled(start, rule.steps, rule.beta) if exact else _polynomial(start, rule.steps)
    with products_in(exact=True):
        squares = (root @ gram).mul_(root).sum((1, 2))
    # an error may make it negative where it should be 0; NaN stays
    return root, torch.where(squares <= 0, 0.0 * squares, squares.rsqrt()) * unit.sqrt()


def _coupled(y: Tensor, steps: int, beta: float) -> Tensor:
    """``T = 3 I - Z Y, Y = beta Y T, Z = beta T Z`` from Z = I (SWAN, algorithm 2). ``y`` is overwritten.

    3 steps - 3 products: the first has Z = I, and nobody needs the last Y.
    """
    z, t, spare = (torch.empty_like(y) for _ in range(3))
    for step in range(steps):
        if step == 0:
            torch.neg(y, out=t)
        else:
            t.baddbmm_(z, y, beta=0, alpha=-1)
        t.diagonal(dim1=1, dim2=2).add_(3)
        if step < steps - 1:
            y, spare = spare.baddbmm_(y, t, beta=0, alpha=beta), y
        if step == 0:
            torch.mul(t, beta, out=z)
        else:
            z, spare = spare.baddbmm_(t, z, beta=0, alpha=beta), z
    return z


def _polynomial(r: Tensor, steps: int) -> Tensor:
    """``Z = a I + b R + c R², Q = Q Z, R = Z R Z`` from Q = I: Muon's iteration on X without X. ``r`` is overwritten.

    4 steps - 3 products: the first has Q = I, and nobody needs the last R.
    """
    a, b, c = QUINTIC
    q, z, spare = (torch.empty_like(r) for _ in range(3))
    for step in range(steps):
        z.copy_(r).baddbmm_(r, r, beta=b, alpha=c)
        z.diagonal(dim1=1, dim2=2).add_(a)
        if step == 0:
            q.copy_(z)
        else:
            q, spare = torch.bmm(q, z, out=spare), q
        if step < steps - 1:
            torch.bmm(torch.bmm(z, r, out=spare), z, out=r)
    return q


@contextmanager
def products_in(exact: bool) -> Iterator[None]:
    """Make torch's fp32 products exact, or let those of NVIDIA's GPUs be TF32, whatever the program has asked for.

    With beta = 0.8 and TF32 the coupled iteration explodes. The setting is the process's, so it is put back.
    """
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    settings = (cuda, cpu)
    before = [setting.fp32_precision for setting in settings]
    try:
        cuda.fp32_precision = "ieee" if exact else "tf32"
        cpu.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
