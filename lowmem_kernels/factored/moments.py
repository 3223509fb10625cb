"""Second moments of one parameter in torch: factored into rows and columns, or in full.

An update takes two looks at the gradient. In the first a moment learns the sums, and from them how large the update
would be; in the second it turns each block of the gradient into its part of the update. Nothing is written into the
state before the caller says `commit`, so a gradient that turns out to be NaN leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import blocks as cut
from ..blocks import Scratch
from ..options import GradTransform
from .rule import FactoredRule

#: Rows of a block at most: longer fp32 column sums would lose digits.
_ROWS = 1024

#: The smallest normal number, whose reciprocal is finite.
_TINY = torch.finfo(torch.float32).tiny

#: Where a block lies: for factored moments (matrices, rows), for full ones the elements.
Place = tuple[slice, ...]


class Moment(Protocol):
    """What `FactoredMoment` and `FullMoment` have in common."""

    def look(self, grad: Tensor, transform: GradTransform, scratch: Scratch) -> float:
        """Read the gradient; return the sum of the squares of the update. NaN or Inf if any element is."""
        ...

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[int, Place, Sequence[Tensor]]]:
        """Cut tensors of the parameter's shape into (index of the first element, place, views)."""
        ...

    def update(self, g: Tensor, place: Place, out: Tensor) -> tuple[Tensor, Tensor]:
        """Return g / sqrt(V) of a block as two factors that broadcast. g may lie in ``out``.

        The first factor lies there or in new memory; the second may lie anywhere, as g.
        """
        ...

    def scale(self, factor: float) -> None:
        """Make `update` return ``factor`` times as much."""
        ...

    def commit(self) -> None:
        """Write what is left to write of the new second moment into the state."""
        ...


class FactoredMoment:
    """``R += w (mean_j q - R)``, ``C += w (mean_i q - C)``, ``V_ij = R_i C_j / mean(R)`` of each matrix n x m."""

    def __init__(self, param: Tensor, row: Tensor, col: Tensor, weight: float, eps: float, floor: bool) -> None:
        self.n, self.m = param.shape[-2:]
        self.row, self.col = row.view(-1, self.n), col.view(-1, self.m)
        self.weight = weight
        self.added, self.floor = (0.0, eps) if floor else (eps, 0.0)

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[int, Place, Sequence[Tensor]]]:
        for first, stack in _stacks(self.n, self.m, tensors):
            for matrices, rows in _places(len(stack[0]), self.n, self.m):
                place = (slice(first + matrices.start, first + matrices.stop), rows)
                start = (place[0].start * self.n + rows.start) * self.m
                yield start, place, [t[matrices, rows] for t in stack]

    def look(self, grad: Tensor, transform: GradTransform, scratch: Scratch) -> float:
        sums = self.col.new_zeros(len(self.col), 2, self.m)
        self.new_row = torch.empty_like(self.row)
        smallest_row = self.row.new_full((len(self.row),), math.inf)
        poison = 0.0
        for _, (matrices, rows), (block,) in self.blocks(grad):
            q = scratch.like(block)[0]
            g, unscaled = cut.read_gradient(block, transform, q)
            if transform.clip_value is not None and transform.skip_nonfinite:
                poison += 0.0 * unscaled.sum().item()  # what clipping would hide
            torch.mul(g, g, out=q)
            mean = q.mean(-1)
            row = torch.lerp(self.row[matrices, rows], mean + self.added, self.weight)
            self.new_row[matrices, rows] = row
            # sum_i q_ij and sum_i q_ij / R_i in one product; a row that is 0 has nothing to add
            left = row.new_ones(len(q), 2, q.shape[1])
            left[:, 1] = row.clamp(min=_TINY).reciprocal_()
            sums[matrices].baddbmm_(left, q)
            if self.floor:
                used = torch.where(mean > 0, row, math.inf)
                smallest_row[matrices] = torch.minimum(smallest_row[matrices], used.amin(-1))
        self.new_col = torch.lerp(self.col, sums[:, 0] / self.n + self.added, self.weight)
        mean_row = self.new_row.mean(-1).clamp_(min=self.floor)
        self.row_scale = _safe_rsqrt(self.new_row / mean_row[:, None])
        self.col_scale = _safe_rsqrt(self.new_col)
        self.bound: float | None = None
        if self.floor:
            # V of the smallest row and column that have a gradient: is the floor under V felt?
            smallest_col = torch.where(sums[:, 0] > 0, self.new_col, math.inf).amin(-1)
            if not (smallest_row / mean_row * smallest_col >= self.floor**2).all():
                self.bound = 1 / self.floor
                return self._sum_of_squares(grad, transform, scratch) + poison
        # sum_ij u² = mean(R) sum_j (sum_i q_ij / R_i) / C_j, so that it needs no third look
        terms = torch.where(self.new_col > 0, sums[:, 1].double() / self.new_col, 0.0)
        return (mean_row.double() * terms.sum(-1)).sum().item() + poison

    def _sum_of_squares(self, grad: Tensor, transform: GradTransform, scratch: Scratch) -> float:
        total = 0.0
        for _, place, (block,) in self.blocks(grad):
            out = scratch.like(block)[0]
            x, y = self.update(cut.read_gradient(block, transform, out)[0], place, out)
            total += x.mul_(y).square_().sum().item()
        return total

    def update(self, g: Tensor, place: Place, out: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols = self.row_scale[place][..., None], self.col_scale[place[0], None, :]
        if self.bound is not None:
            return (rows * cols).clamp_(max=self.bound), g
        return torch.mul(g, cols, out=out), rows

    def scale(self, factor: float) -> None:
        self.row_scale *= factor
        if self.bound is not None:
            self.bound *= factor

    def commit(self) -> None:
        self.row.copy_(self.new_row)
        self.col.copy_(self.new_col)


class FullMoment:
    """``V += w (q - V)``, for parameters of fewer than two dimensions; written block by block, by `update`."""

    def __init__(self, param: Tensor, moment: Tensor, weight: float, eps: float, floor: bool) -> None:
        self.moment, self.weight = moment.view(-1), weight
        self.added, self.floor = (0.0, eps) if floor else (eps, 0.0)
        self.factor = 1.0

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[int, Place, Sequence[Tensor]]]:
        flat = [t.view(-1) if t.ndim == 0 else t for t in tensors]
        for start in range(0, flat[0].numel(), cut.BLOCK):
            place = slice(start, start + cut.BLOCK)
            yield start, (place,), [t[place] for t in flat]

    def look(self, grad: Tensor, transform: GradTransform, scratch: Scratch) -> float:
        total = 0.0
        for _, place, (block,) in self.blocks(grad):
            out = scratch.like(block)[0]
            g, unscaled = cut.read_gradient(block, transform, out)
            if transform.clip_value is not None and transform.skip_nonfinite:
                total += 0.0 * unscaled.sum().item()  # what clipping would hide
            total += self._inverse_root(self._moved(g, place)).mul_(g).square_().sum().item()
        return total

    def _moved(self, g: Tensor, place: Place) -> Tensor:
        return torch.lerp(self.moment[place], (g * g).add_(self.added), self.weight)

    def _inverse_root(self, moment: Tensor) -> Tensor:
        return _safe_rsqrt(moment.clamp_(min=self.floor**2) if self.floor else moment)

    def update(self, g: Tensor, place: Place, out: Tensor) -> tuple[Tensor, Tensor]:
        moment = self._moved(g, place)
        self.moment[place] = moment
        return self._inverse_root(moment).mul_(self.factor), g

    def scale(self, factor: float) -> None:
        self.factor *= factor

    def commit(self) -> None:
        pass


def moment_of(param: Tensor, row: Tensor, col: Tensor | None, step: int, rule: FactoredRule) -> Moment:
    """Return the second moment of a parameter as it will be at ``step``, by the rule's schedule."""
    weight = float(step) ** rule.decay_rate if rule.beta2 is None else 1 - rule.beta2
    if col is None:
        return FullMoment(param, row, weight, rule.eps[0], rule.eps_floor)
    return FactoredMoment(param, row, col, weight, rule.eps[0], rule.eps_floor)


def _safe_rsqrt(x: Tensor) -> Tensor:
    # a moment of 0 belongs to gradients that are 0, whose update is 0 and not 0 * Inf
    return torch.where(x > 0, x.rsqrt(), 0.0)


def _stacks(n: int, m: int, tensors: Sequence[Tensor], first: int = 0) -> Iterator[tuple[int, list[Tensor]]]:
    """Views [matrices, n, m] of the tensors, with the number of their first matrix; more than one where dimensions
    cannot be merged."""
    if tensors[0].numel() == 0:
        return
    try:
        yield first, [t.view(-1, n, m) for t in tensors]
    except RuntimeError:
        step = tensors[0][0].numel() // (n * m)
        for i in range(len(tensors[0])):
            yield from _stacks(n, m, [t[i] for t in tensors], first + i * step)


def _places(matrices: int, n: int, m: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of whole rows: several small matrices, or a part of one."""
    rows = max(1, min(n, _ROWS, cut.BLOCK // m))
    many = max(1, cut.BLOCK // (n * m)) if rows == n else 1
    for e in range(0, matrices, many):
        for r in range(0, n, rows):
            yield slice(e, min(e + many, matrices)), slice(r, min(r + rows, n))
