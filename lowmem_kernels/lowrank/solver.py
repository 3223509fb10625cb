"""The part of the low-rank step that is nothing but an r x r matrix."""

from __future__ import annotations

import torch
from torch import Tensor

#: A column counts as one that depends on those before it if what is left of its square is less than this of it. Errors
#: of fp32 sums are some 1e-7 of it.
DEPENDENT = 2.0**-20

#: Smallest normal fp32 number: a square below it counts as zero.
TINY = 2.0**-126


def triangular(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return (C, inverse of C) with ``gram = C C^T`` and C lower triangular: Cholesky without failure, for [r, r].

    A column that depends on those before it is 0 in C, and its row and column are 0 in the inverse. So ``Y C^-T`` has
    orthonormal columns and, where Y is rank deficient, columns of zeros. In float64, returned as ``gram``'s dtype.
    """
    rest = gram.double()
    size = rest.diagonal().clone()
    lower, info = torch.linalg.cholesky_ex(rest)
    pivots = lower.diagonal().square()
    if info.item() == 0 and bool(((pivots > DEPENDENT * size) & (pivots > TINY)).all()):
        eye = torch.eye(len(rest), dtype=rest.dtype, device=rest.device)
        return lower.to(gram.dtype), torch.linalg.solve_triangular(lower, eye, upper=False).to(gram.dtype)
    lower, inverse = torch.zeros_like(rest), torch.zeros_like(rest)
    for k in range(len(rest)):
        pivot = rest[k, k].item()
        # not <=: NaN is no pivot either
        if not (pivot > DEPENDENT * size[k].item() and pivot > TINY):
            continue
        column = rest[:, k] / pivot**0.5
        column[:k] = 0
        rest = rest - torch.outer(column, column)
        lower[:, k] = column
        row = -(lower[k, :k] @ inverse[:k])
        row[k] += 1
        inverse[k] = row / lower[k, k]
    return lower.to(gram.dtype), inverse.to(gram.dtype)
