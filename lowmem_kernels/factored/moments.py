"""Second moments of one parameter in torch: factored into rows and columns, or in full.

An update takes two looks at the gradient. In the first a moment learns the sums, and from them how large the update
would be; in the second it turns each block of the gradient into its part of the update. Nothing is written into the
state before the caller says `commit`, so a gradient that turns out to be NaN leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import blocks as cut
from ..blocks import Scratch
from ..options import GradTransform
from .rule import FactoredRule

#: Rows of a block at most: longer fp32 column sums would lose digits.
_ROWS = 1024

#: Numerator of 1 / R, with which no R > 0 makes Inf, and none below 2**105 a number that has lost digits.
_UNIT = 2.0**-22
_SMALLEST = 2.0**-149

#: What `Moment.update` has to know of a block: views of the moment's factors.
Part = Sequence[Tensor]


class Moment(Protocol):
    """What `FactoredMoment` and `FullMoment` have in common."""

    def look(
        self, grad: Tensor, transform: GradTransform, scratch: Scratch, param_squares: float
    ) -> Generator[Tensor, None, tuple[float, float]]:
        """Read the gradient; return the sum of the squares of the update, NaN or Inf if any sum is, and of p.

        Where rows are in several processes, yields a vector that is to be summed over them; then ``param_squares`` are
        those here, and what is returned is of the whole.
        """
        ...

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[int, Part, Sequence[Tensor]]]:
        """Cut tensors of the parameter's shape into (index of the first element, what `update` takes, views)."""
        ...

    def update(self, g: Tensor, part: Part, out: Tensor) -> tuple[Tensor, Tensor]:
        """Return g / sqrt(V) of a block as two factors that broadcast. g may lie in ``out``.

        The first factor lies there or in new memory; the second may lie anywhere, as g.
        """
        ...

    def squares(self, block: Tensor, out: Tensor) -> float:
        """Return the sum of the squares of a block, the same whatever its strides are; ``out`` may be written."""
        ...

    def scale(self, factor: float) -> None:
        """Make `update` return ``factor`` times as much."""
        ...

    def commit(self) -> None:
        """Write what is left to write of the new second moment into the state."""
        ...


class FactoredMoment:
    """``R += w (mean_j q - R)``, ``C += w (mean_i q - C)``, ``V_ij = R_i C_j / mean(R)`` of each matrix n x m.

    Of E matrices, what belongs to rows is [E, n, 1] here and what belongs to columns [E, 1, m].
    """

    def __init__(
        self, param: Tensor, row: Tensor, col: Tensor, weight: float, eps: float, floor: bool, rows: int | None
    ) -> None:
        self.n, self.m = param.shape[-2:]
        #: rows of the whole, where these are not all
        self.rows = rows
        matrices = math.prod(param.shape[:-2])
        self.row, self.col = row.view(matrices, self.n, 1), col.view(matrices, 1, self.m)
        self.row_scale, self.col_scale = self.row, self.col  # until `look` makes them
        self.weight = weight
        self.added, self.floor = (0.0, eps) if floor else (eps, 0.0)
        self.bound: float | None = None

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[int, Part, Sequence[Tensor]]]:
        for start, views, rows, cols in _blocks(self.n, self.m, tensors, [self.row_scale], [self.col_scale]):
            yield start, (*rows, *cols), views

    def look(
        self, grad: Tensor, transform: GradTransform, scratch: Scratch, param_squares: float
    ) -> Generator[Tensor, None, tuple[float, float]]:
        # in every block, as few calls as there can be: at 4096 columns they cost as much as the arithmetic
        self.new_row = self.row.clone()
        means = torch.empty_like(self.row)
        left = self.row.new_ones(len(self.row), self.n, 2)
        sums = self.col.new_zeros(len(self.col), 2, self.m)
        unit, smallest, added, share = (
            self.row.new_tensor(x) for x in (_UNIT, _SMALLEST, self.added, 1 / max(self.m, 1))
        )
        poison = 0.0
        row_like = (self.new_row, means, left, left[..., 1:])
        for _, (block,), (row, mean, factors, inverse), (col_sums,) in _blocks(
            self.n, self.m, [grad], row_like, [sums]
        ):
            q = scratch.like(block)[0]
            g, unscaled = cut.read_gradient(block, transform, q)
            if transform.clip_value is not None and transform.skip_nonfinite:
                poison += 0.0 * unscaled.sum().item()  # what clipping would hide
            torch.mul(g, g, out=q)  # contiguous, so that sums are the same whatever the strides are
            torch.addcmul(added, torch.sum(q, -1, keepdim=True, out=mean), share, out=mean)
            # by the difference: a factor 1 - w, rounded, would make the same error in every step, which adds up
            row.lerp_(mean, self.weight)
            torch.div(unit, row if self.added else torch.maximum(row, smallest, out=inverse), out=inverse)
            # sum_i q_ij and sum_i q_ij / R_i in one product; a row that is 0 has nothing to add
            col_sums.baddbmm_(factors.mT, q)
        n, mean_row = self.n, self.new_row.mean(1, keepdim=True)
        if self.rows is not None:
            n = self.rows
            numbers = sums.new_tensor([poison, param_squares])
            vector = torch.cat([sums.flatten(), self.new_row.sum(1).flatten(), numbers])
            yield vector
            totals, total_row, numbers = vector.split([sums.numel(), len(self.row), 2])
            sums, mean_row = totals.view(sums.shape), total_row.view(-1, 1, 1) / n
            poison, param_squares = numbers.tolist()
        self.new_col = torch.lerp(self.col, sums[:, :1] / n + self.added, self.weight)
        mean_row = mean_row.clamp_(min=self.floor)
        poison += 0.0 * (mean_row.double().sum() + self.new_col.double().sum()).item()
        self.row_scale = _safe_rsqrt(self.new_row / mean_row)
        self.col_scale = _safe_rsqrt(self.new_col)
        if self.floor:
            # V of the smallest row and column that have a gradient: is the floor under V felt?
            smallest_row = torch.where(means > 0, self.new_row, math.inf).amin(1, keepdim=True).double()
            smallest_col = torch.where(sums[:, :1] > 0, self.new_col, math.inf).amin(2, keepdim=True).double()
            # where it is below fp32's normal numbers, 1 / R may be Inf, and the column sums do not tell the sum of u²
            if not (smallest_row / mean_row * smallest_col > max(self.floor**2, 2.0**-126)).all():
                self.bound = 1 / self.floor
                return self._sum_of_squares(grad, transform, scratch) + poison, param_squares
        # sum_ij u² = mean(R) sum_j (sum_i q_ij / R_i) / C_j, so that it needs no third look
        terms = torch.where(self.new_col > 0, sums[:, 1:].double() / self.new_col, 0.0)
        return (mean_row * terms.sum(2, keepdim=True)).sum().item() / _UNIT + poison, param_squares

    def _sum_of_squares(self, grad: Tensor, transform: GradTransform, scratch: Scratch) -> float:
        total = 0.0
        for _, part, (block,) in self.blocks(grad):
            out = scratch.like(block)[0]
            x, y = self.update(cut.read_gradient(block, transform, out)[0], part, out)
            total += x.mul_(y).square_().sum((1, 2)).double().sum().item()
        return total

    def update(self, g: Tensor, part: Part, out: Tensor) -> tuple[Tensor, Tensor]:
        row_scale, col_scale = part
        if self.bound is not None:
            return (row_scale * col_scale).clamp_(max=self.bound), g
        return torch.mul(g, col_scale, out=out), row_scale

    def squares(self, block: Tensor, out: Tensor) -> float:
        x = block if block.dtype == torch.float32 and block.is_contiguous() else out.copy_(block)
        if 2 * self.n * self.m > cut.BLOCK:
            return torch.dot(x.view(-1), x.view(-1)).item()
        # each matrix for itself: how many lie in a block may depend on strides
        return x.square().sum((1, 2)).double().sum().item()

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

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[int, Part, Sequence[Tensor]]]:
        flat = [t.view(-1) if t.ndim == 0 else t for t in tensors]
        for start in range(0, flat[0].numel(), cut.BLOCK):
            moment, *views = (t[start : start + cut.BLOCK] for t in (self.moment, *flat))
            yield start, (moment,), views

    def look(
        self, grad: Tensor, transform: GradTransform, scratch: Scratch, param_squares: float
    ) -> Generator[Tensor, None, tuple[float, float]]:
        yield from ()  # a vector is in one piece
        total = 0.0
        for _, (old,), (block,) in self.blocks(grad):
            g, unscaled = cut.read_gradient(block, transform, scratch.like(block)[0])
            if transform.clip_value is not None and transform.skip_nonfinite:
                total += 0.0 * unscaled.sum().item()  # what clipping would hide
            moment = self._moved(old, g)
            total += 0.0 * moment.amax().item()  # Inf would make an update of 0
            total += self._inverse_root(moment).mul_(g).square_().sum().item()
        return total, param_squares

    def squares(self, block: Tensor, out: Tensor) -> float:
        return block.float().square().sum().item()

    def _moved(self, moment: Tensor, g: Tensor) -> Tensor:
        return torch.lerp(moment, (g * g).add_(self.added), self.weight)

    def _inverse_root(self, moment: Tensor) -> Tensor:
        return _safe_rsqrt(moment.clamp(min=self.floor**2) if self.floor else moment)

    def update(self, g: Tensor, part: Part, out: Tensor) -> tuple[Tensor, Tensor]:
        moment = part[0].copy_(self._moved(part[0], g))
        return self._inverse_root(moment).mul_(self.factor), g

    def scale(self, factor: float) -> None:
        self.factor *= factor

    def commit(self) -> None:
        pass


def moment_of(
    param: Tensor, row: Tensor, col: Tensor | None, step: int, rule: FactoredRule, rows: int | None
) -> Moment:
    """Return the second moment of a parameter as it will be at ``step``, by the rule's schedule.

    ``rows`` are those of the whole where the parameter has some of them; None: it has all.
    """
    weight = float(step) ** rule.decay_rate if rule.beta2 is None else 1 - rule.beta2
    if col is None:
        return FullMoment(param, row, weight, rule.eps[0], rule.eps_floor)
    return FactoredMoment(param, row, col, weight, rule.eps[0], rule.eps_floor, rows)


def _safe_rsqrt(x: Tensor) -> Tensor:
    # a moment of 0 belongs to gradients that are 0, whose update is 0 and not 0 * Inf
    return torch.where(x > 0, x.rsqrt(), 0.0)


def _blocks(
    n: int, m: int, tensors: Sequence[Tensor], row_like: Sequence[Tensor], col_like: Sequence[Tensor]
) -> Iterator[tuple[int, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]]:
    """Cut tensors of one shape, [E, n, x] and [E, x, m] into blocks of whole rows: several small matrices, or a part of
    one. Yields (index of the first element, views of the first, of the second, of the third)."""
    rows = max(1, min(n, _ROWS, cut.BLOCK // max(m, 1)))
    matrices = max(1, cut.BLOCK // max(n * m, 1)) if rows == n else 1
    done = 0
    for stack in _stacks(n, m, tensors):
        some = slice(done, done + len(stack[0]))
        start, done = done * n * m, some.stop
        by_rows, by_matrices = [*stack, *(t[some] for t in row_like)], [t[some] for t in col_like]
        groups = zip(*(t.split(matrices) for t in (*by_rows, *by_matrices)), strict=True)
        for group in groups:
            for views in zip(*(t.split(rows, 1) for t in group[: len(by_rows)]), strict=True):
                yield start, views[: len(stack)], views[len(stack) :], group[len(by_rows) :]
                start += views[0].numel()


def _stacks(n: int, m: int, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Views [matrices, n, m] of the tensors; more than one where dimensions cannot be merged."""
    if tensors[0].numel() == 0:
        return
    try:
        yield [t.view(-1, n, m) for t in tensors]
    except RuntimeError:
        for i in range(len(tensors[0])):
            yield from _stacks(n, m, [t[i] for t in tensors])
