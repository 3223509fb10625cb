"""Whitening in torch: the specification of the kernels, and the path that CPUs take.

X, the normalised gradient, is only ever there as blocks of whole rows, and so is the update. Shapes: m rows, n columns,
K = min(m, n).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..blocks import found_inf, read_gradient, store_, sum_is_finite
from ..options import GradTransform, Rounding
from ..rounding import stream_key
from .rule import WhiteningRule
from .solver import TINY, inverse_root, products_in

#: Elements of a block: 16 MB of fp32. A wide matrix of B blocks is normalised 1.5 B times over, so they are larger
#: than those that fit into a cache.
BLOCK = 1 << 22


@torch.no_grad()
def whiten_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    scale: float,
    weight_decay: float,
    rule: WhiteningRule,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.whitening.whiten_`."""
    lr = float(lr)
    if found_inf(transform):
        return
    for param, grad, step, key in zip(params, grads, steps, rounding.keys(len(params)), strict=True):
        stack = [_Normalized(matrix, rule, transform) for matrix in matrices(grad, rule.conv)]
        if transform.skip_nonfinite and not all(x.finite for x in stack):
            if transform.skipped is not None:
                transform.skipped.add_(1)
            continue
        noise_key, start = stream_key(key, int(step.add_(1)), 0), 0
        for matrix, x in zip(matrices(param, rule.conv), stack, strict=True):
            for rows, update in x.whitened(rule):
                p = matrix[rows]
                value = p.to(torch.float32)
                # one subtraction: p * (1 - lr * weight_decay) would repeat the same rounding error every step
                value.sub_(update.view(p.shape).mul_(lr * scale).add_(value, alpha=lr * weight_decay))
                store_(p, value, rounding.stochastic, noise_key, start)
                start += p.numel()


@torch.no_grad()
def whitened(grads: Sequence[Tensor], *, rule: WhiteningRule, transform: GradTransform) -> list[Tensor]:
    """As `lowmem_kernels.whitening.whitened`."""
    results = []
    for grad in grads:
        result = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        for matrix, out in zip(matrices(grad, rule.conv), matrices(result, rule.conv), strict=True):
            for rows, update in _Normalized(matrix, rule, transform).whitened(rule):
                out[rows] = update.view(out[rows].shape)
        results.append(result)
    return results


def matrices(tensor: Tensor, conv: bool) -> Iterator[Tensor]:
    """Views of a tensor's matrices: of shape [m, n], or [m, ...] where all but the first dimension are columns."""
    if tensor.numel() == 0:
        return
    if conv:
        yield tensor
    else:
        for index in itertools.product(*map(range, tensor.shape[:-2])):
            yield tensor[index]


class _Normalized:
    """X of one matrix: where its gradient is, and the mean and factor of each row."""

    def __init__(self, grad: Tensor, rule: WhiteningRule, transform: GradTransform) -> None:
        self.grad, self.transform = grad, transform
        self.m, self.n = len(grad), grad.numel() // len(grad)
        self.mean, self.scale = (torch.zeros(self.m, 1, device=grad.device) for _ in range(2))
        self.finite = True
        height = max(1, BLOCK // self.n)
        self.blocks = [slice(i, min(i + height, self.m)) for i in range(0, self.m, height)]
        for rows in self.blocks:
            g, unscaled = read_gradient(grad[rows].flatten(1), transform)
            if rule.centred:
                # of distances from the row's first element, so that a constant row has no deviation at all
                first = g[:, :1].clone()
                self.mean[rows] = first + (g - first).mean(1, keepdim=True)
            squares = (g - self.mean[rows]).square_().sum(1, keepdim=True)
            # times m, so that the sum over all rows is finite too
            self.finite = self.finite and bool((squares * self.m).isfinite().all())
            if transform.clip_value is not None:
                self.finite = self.finite and (sum_is_finite(unscaled) or bool(unscaled.isfinite().all()))
            if rule.normalize is None:
                self.scale[rows] = 1.0
            else:
                square = squares / self.n
                # the product makes NaN of an Inf, of which the root would make a row of zeros
                self.scale[rows] = torch.where(square < TINY, 0.0, (square + 0.0 * square).rsqrt())

    def whitened(self, rule: WhiteningRule) -> Iterator[tuple[slice, Tensor]]:
        """D in blocks: (which rows, [rows, n] in fp32)."""
        x = lru_cache(maxsize=2)(self._rows)  # so that a matrix of one or two blocks is normalised once
        right = self.m >= self.n
        root, inverse = inverse_root(self._gram(x, right)[None], rule, lift=right and rule.centred)
        root = root[0].mul_(inverse * math.sqrt(self.m * self.n))
        for i, rows in enumerate(self.blocks):
            with products_in(exact=True):
                if right:
                    update = x(i) @ root
                else:
                    update = torch.zeros(rows.stop - rows.start, self.n, device=root.device)
                    for k, others in enumerate(self.blocks):
                        update.addmm_(root[rows, others], x(k))
            yield rows, update

    def _gram(self, x: Callable[[int], Tensor], right: bool) -> Tensor:
        """``X^T X`` where ``right``, else ``X X^T``."""
        size = min(self.m, self.n)
        gram = torch.zeros(size, size, device=self.grad.device)
        with products_in(exact=True):
            for i, rows in enumerate(self.blocks):
                if right:
                    gram.addmm_(x(i).T, x(i))
                    continue
                for k, others in enumerate(self.blocks[: i + 1]):
                    gram[rows, others] = x(i) @ x(k).T
                    gram[others, rows] = gram[rows, others].T.clone()
        return gram

    def _rows(self, block: int) -> Tensor:
        """A block of rows of X, in fp32."""
        rows = self.blocks[block]
        g, _ = read_gradient(self.grad[rows].flatten(1), self.transform)
        return (g - self.mean[rows]).mul_(self.scale[rows])
