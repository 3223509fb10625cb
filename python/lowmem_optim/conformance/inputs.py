"""Tensors that probes run over: made of a seed, so that all runs see the same."""

from __future__ import annotations

import torch
from torch import Tensor

#: Two matrices, one of each kind.
MATRICES = ((9, 14), (14, 9))
VECTOR = (11,)


def values(*shape: int, seed: int) -> Tensor:
    """Normally distributed float32 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def starts(*shapes: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    """A tensor of each shape."""
    return [scale * values(*shape, seed=i) for i, shape in enumerate(shapes)]


def gradients(*shapes: tuple[int, ...], steps: int, first: int = 0) -> list[list[Tensor]]:
    """Gradients for each shape at each step, of sizes 0.2, 1 and 3 in turns and with a mean that is not 0."""
    return [
        [
            (0.2, 1.0, 3.0)[step % 3] * (values(*shape, seed=1000 * (step + 1) + i) - 0.2)
            for i, shape in enumerate(shapes)
        ]
        for step in range(first, first + steps)
    ]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits; -0.0 is not 0.0, and a NaN equals itself."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(
        a.detach().contiguous().view(-1).view(torch.uint8), b.detach().contiguous().view(-1).view(torch.uint8)
    )
