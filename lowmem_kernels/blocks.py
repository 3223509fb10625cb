"""What the torch references share: walking tensors in blocks, reading the gradient, writing results.

Work goes in blocks that stay in a core's cache, so that a step costs few trips through memory and a few MB of
temporaries however large a tensor is. Everything may wait for the device: this path is made for CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .numerics import STOCHASTIC_DTYPES
from .options import GradTransform
from .rounding import store_stochastic_
from .shards import Shard

#: Elements worked on at a time: 512 KiB of fp32 for each of about four temporaries. Twice as fast with stochastic
#: rounding as half of it, where the calls cost as much as the arithmetic.
BLOCK = 1 << 17


def blocks(*tensors: Tensor, start: int = 0) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Cut tensors of one shape into views of at most BLOCK elements: (index of the first element, views) in order."""
    numel = tensors[0].numel()
    if all(t.is_contiguous() for t in tensors):
        flat = [t.view(-1) for t in tensors]
        for begin in range(0, numel, BLOCK):
            yield start + begin, [t[begin : begin + BLOCK] for t in flat]
    elif numel <= BLOCK:
        yield start, tensors
    else:
        row = numel // len(tensors[0])
        rows = BLOCK // row
        for i in range(0, len(tensors[0]), max(1, rows)):
            yield from blocks(*(t[i : i + rows] if rows else t[i] for t in tensors), start=start + i * row)


def row_blocks(matrices: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Cut matrices into blocks of whole rows: several small matrices, or a part of one. Yields (matrices, rows)."""
    if not matrices * rows * columns:
        return
    count = max(1, min(rows, BLOCK // columns))
    some = max(1, BLOCK // (rows * columns)) if count == rows else 1
    for e in range(0, matrices, some):
        for row in range(0, rows, count):
            yield slice(e, e + some), slice(row, row + count)


class Scratch:
    """fp32 tensors for the temporaries of blocks: those of the last block, wherever they fit.

    Temporaries that each block allocates are new pages, and not in the cache.
    """

    def __init__(self, count: int) -> None:
        self._tensors = [torch.empty(0)] * count

    def like(self, block: Tensor) -> Sequence[Tensor]:
        """Return contiguous tensors of the block's shape, with any values."""
        if self._tensors[0].shape != block.shape:
            self._tensors = [torch.empty(block.shape, device=block.device) for _ in self._tensors]
        return self._tensors


def as_fp32(x: Tensor, out: Tensor) -> Tensor:
    """Return x if it is fp32, else its values in ``out``."""
    return x if x.dtype == torch.float32 else out.copy_(x)


def read_gradient(grad: Tensor, transform: GradTransform, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the gradient as ``transform`` says, and as it was before ``clip_value``, both in fp32.

    They may be one tensor, and lie in the memory of ``grad`` or, where given, of ``out``.
    """
    unscaled = grad.to(torch.float32) if out is None else as_fp32(grad, out)
    if transform.inv_scale is not None:
        unscaled = torch.mul(unscaled, transform.inv_scale, out=out)
    if transform.maximize:
        unscaled = torch.neg(unscaled, out=out)
    g = unscaled
    if transform.clip_value is not None:
        g = unscaled.clamp(-transform.clip_value, transform.clip_value)
    if transform.clip_coef is not None:
        g = torch.mul(g, transform.clip_coef, out=g if transform.clip_value is not None else out)
    return g, unscaled


def found_inf(transform: GradTransform) -> bool:
    """Say whether nothing is to be written at all."""
    return transform.found_inf is not None and transform.found_inf.item() != 0


def sum_is_finite(x: Tensor) -> bool:
    """Say whether the sum is finite: then all elements are. A sum is 20 times cheaper than isfinite()."""
    return math.isfinite(x.sum().item())


def store_(target: Tensor, value: Tensor, stochastic: bool, key: int, start: int, shard: Shard | None = None) -> None:
    """Write fp32 ``value``, which may be overwritten, into ``target``, rounded once.

    ``key`` is a stream_key, ``start`` the logical index of the first element, in ``shard`` if there is one, as
    `store_stochastic_` takes them.
    """
    if stochastic and target.dtype in STOCHASTIC_DTYPES:
        store_stochastic_(target, value, key, start, shard)
    elif value is not target:
        target.copy_(value)
