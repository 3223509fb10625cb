"""Partial momentum in torch: the specification of the kernels, and the path that CPUs take.

Everything of the gradient's size is only ever there as blocks of whole rows. Shapes: m rows, n columns, rank r.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import BLOCK, found_inf, read_gradient, store_, sum_is_finite
from ..options import GradTransform, Rounding
from ..rounding import stream_key
from .checks import Form, form_of, matrix_shape
from .rule import MomentumRule
from .solver import TINY, triangular


class _Hyper(NamedTuple):
    """What all parameters of a call share."""

    form: Form
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    rule: MomentumRule
    transform: GradTransform

    @property
    def keeps(self) -> str:
        """What a gradient that is not finite stops: the "element", the "row" or the "parameter"."""
        if self.rule.clip_of("rms") is not None or self.form.momentum == "lowrank":
            return "parameter"
        return {"element": "element", "rows": "row"}.get(self.form.second, "parameter")


class _Factors(NamedTuple):
    """L and R of a matrix, before and after."""

    old: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]


@torch.no_grad()
def partial_momentum_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    exp_avgs: Sequence[Tensor] | None,
    lefts: Sequence[Tensor] | None,
    rights: Sequence[Tensor] | None,
    exp_avg_sqs: Sequence[Tensor] | None,
    row_sqs: Sequence[Tensor] | None,
    col_sqs: Sequence[Tensor] | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rule: MomentumRule,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.lowrank.partial_momentum_update_`."""
    if found_inf(transform):
        return
    form = form_of(exp_avgs, lefts, rights, exp_avg_sqs, row_sqs, col_sqs)
    hyper = _Hyper(form, float(lr), betas, eps, weight_decay, rule, transform)
    lists = (exp_avgs, lefts, rights, exp_avg_sqs, row_sqs, col_sqs)
    for i, (param, grad, step, key) in enumerate(zip(params, grads, steps, rounding.keys(len(params)), strict=True)):
        given = [None if each is None else each[i] for each in lists]
        moved = _Parameter(param, grad, given, int(step) + 1, hyper).update(rounding.stochastic, key)
        if moved:
            step.add_(1)


class _Parameter:
    """One parameter, cut into pieces of two dimensions: [(first row, p, g, m, v, first of its v of columns)]."""

    def __init__(self, param: Tensor, grad: Tensor, given: Sequence[Tensor | None], step: int, hyper: _Hyper) -> None:
        self.param, self.hyper, self.step = param, hyper, step
        exp_avg, left, right, exp_avg_sq, self.row_sq, self.col_sq = given
        self.stack, self.m, self.n = matrix_shape(param.shape, hyper.form.by_matrix)
        tensors: tuple[Tensor | None, ...] = (param, grad, exp_avg, exp_avg_sq)
        if self.stack == 1 and all(t is None or t.is_contiguous() for t in tensors):
            tensors = tuple([None if t is None else t.view(self.m, self.n) for t in tensors])
        self.pieces = list(_pieces(*tensors))
        self.row_sums = torch.zeros(self.stack * self.m, device=param.device)
        self.col_sums = torch.zeros(self.stack, self.n, device=param.device)
        self.rows: Tensor | None = None  # v of each row
        self.cols: Tensor | None = None  # v of each column of each matrix
        self.factors: list[_Factors] = []
        if left is not None and right is not None:
            self.lefts = left.view(self.stack, *left.shape[-2:])
            self.rights = right.view(self.stack, *right.shape[-2:])
        self.skipped = 0
        self.kept_rows: Tensor | None = None

    def update(self, stochastic: bool, key: int) -> bool:
        """Update all; says whether the parameter moved."""
        hyper, skip = self.hyper, self.hyper.transform.skip_nonfinite
        if hyper.form.momentum == "lowrank" or hyper.form.second != "element":
            self._sums()
            bad = ~self.row_sums.isfinite()
            if skip and bad.any():
                if hyper.keeps == "parameter" or self._grouped():
                    return self._skip()
                self.kept_rows = bad
                self.skipped = int(bad.sum())
        new_moments = self._new_moments()
        factor = 1.0
        bound = hyper.rule.clip_of("rms")
        if bound is not None:
            squares = sum(x.square().sum().item() for _, _, x in self._updates(write=False))
            if skip and not math.isfinite(squares):
                return self._skip()
            rms = math.sqrt(squares / max(self.param.numel(), 1))
            # so that NaN stays
            factor = 1.0 if rms <= bound else bound / rms
        for state, new in new_moments:
            state.copy_(new)
        noise_key = stream_key(key, self.step, 0)
        clamp = hyper.rule.clip_of("elem")
        for start, (p, keep), x in self._updates(write=True):
            if clamp is not None:
                x.clamp_(-clamp, clamp)
            value = p.to(torch.float32, memory_format=torch.contiguous_format)
            # one subtraction: p * (1 - lr * weight_decay) would repeat the same rounding error every step
            new = value - (x * (hyper.lr * factor)).add_(value, alpha=hyper.lr * hyper.weight_decay)
            store_(p, new if keep is None else torch.where(keep, new, value), stochastic, noise_key, start)
        for each, factors in enumerate(self.factors):
            self.lefts[each].copy_(factors.new[0])
            self.rights[each].copy_(factors.new[1])
        if hyper.transform.skipped is not None:
            hyper.transform.skipped.add_(self.skipped)
        return True

    def _skip(self) -> bool:
        if self.hyper.transform.skipped is not None:
            self.hyper.transform.skipped.add_(1)
        return False

    def _grouped(self) -> bool:
        """Whether some v is of more than a single row."""
        return self.row_sq is None or self.row_sq.numel() != self.stack * self.m

    def _blocks(self) -> Iterator[tuple[int, slice, list[Tensor | None]]]:
        """(matrix, its rows, [p, g, m, v] of these rows)."""
        height = max(1, BLOCK // max(self.n, 1))
        for first, views in self.pieces:
            param = views[0]
            assert param is not None
            count = len(param)
            for i in range(0, count, height):
                matrix, row = divmod(first + i, self.m) if self.stack > 1 else (0, first + i)
                part = slice(i, min(i + height, count))
                yield matrix, slice(row, row + part.stop - i), [None if v is None else v[part] for v in views]

    def _gradient(self, block: Tensor) -> tuple[Tensor, Tensor | None]:
        """(g, usable elements or None for all), with NaN where it may not be used."""
        transform = self.hyper.transform
        # so that sums do not depend on how it lies in memory
        g, unscaled = read_gradient(block.contiguous(), transform)
        if not transform.skip_nonfinite or (sum_is_finite(unscaled) and (g is unscaled or sum_is_finite(g))):
            return g, None
        usable = unscaled.isfinite() & g.isfinite()
        return torch.where(usable, g, math.nan), usable

    def _sums(self) -> None:
        """Sums of squares of rows and columns, and the new factors."""
        hyper, low = self.hyper, self.hyper.form.momentum == "lowrank"
        pull = hyper.rule.damping * (1 - hyper.betas[0])
        sketches = torch.zeros_like(self.lefts) if low else None
        for matrix, rows, (_, grad, *_) in self._blocks():
            assert grad is not None
            g, _ = self._gradient(grad)
            squares = g.square()
            first = matrix * self.m
            self.row_sums[first + rows.start : first + rows.stop] = squares.sum(1)
            self.col_sums[matrix] += squares.sum(0)
            if sketches is not None:
                left = self.lefts[matrix, rows]
                torch.add((1 - pull) * left, g @ self.rights[matrix].mT, alpha=pull, out=sketches[matrix, rows])
        if sketches is not None:
            self._solve(sketches)

    def _solve(self, sketches: Tensor) -> None:
        beta = self.hyper.betas[0]
        # the first one goes all the way, or R at the start would be part of the momentum
        damping = 1.0 if self.step == 1 else self.hyper.rule.damping
        if (self.step - 1) % self.hyper.rule.every:
            for old, left in zip(zip(self.lefts, self.rights, strict=True), sketches, strict=True):
                self.factors.append(_Factors(old, (left, old[1])))
            return
        products = torch.zeros_like(self.rights)
        for matrix, rows, (_, grad, *_) in self._blocks():
            assert grad is not None
            products[matrix].addmm_(sketches[matrix, rows].mT, self._gradient(grad)[0])
        for left, right, sketch, product in zip(self.lefts, self.rights, sketches, products, strict=True):
            lower, inverse = triangular(sketch.mT @ sketch)
            kept = damping * beta * inverse @ (sketch.mT @ left) + (1 - damping) * lower.mT
            core = damping * (1 - beta) * inverse @ product + kept @ right
            # a row of Q^T A that is not there makes room for one of R: Q has zeros, so that no product notices
            core = torch.where(inverse.diagonal()[:, None] == 0, right, core)
            scale, unscale = triangular(core @ core.mT)
            dead = scale.diagonal() == 0
            new_right = torch.where(dead[:, None], right, unscale @ core)
            self.factors.append(_Factors((left, right), (sketch @ (inverse.mT @ scale), new_right)))

    def _new_moments(self) -> list[tuple[Tensor, Tensor]]:
        """(state, what it becomes) of v of groups; sets v of each row and column."""
        found = []
        weight = 1 - self.hyper.betas[1]
        for state, sums, length in ((self.row_sq, self.row_sums, self.n), (self.col_sq, self.col_sums, self.m)):
            if state is None or self.param.numel() == 0:
                continue
            groups = state.numel()
            size = sums.numel() // groups
            means = sums.view(groups, size).sum(1) / max(size * length, 1)
            old = state.view(-1)
            new = torch.lerp(old, means, weight)
            if self.kept_rows is not None:
                new = torch.where(self.kept_rows, old, new)
            found.append((state, new.view(state.shape)))
            each = new.repeat_interleave(size)
            if state is self.row_sq:
                self.rows = each
            else:
                self.cols = each.view(self.stack, self.n)
        if self.rows is not None and self.cols is not None:
            mean = self.rows.view(self.stack, self.m).mean(1, keepdim=True)
            self.rows = torch.where(mean == 0, 0.0, self.rows.view(self.stack, self.m) / mean).flatten()
        return found

    def _updates(self, write: bool) -> Iterator[tuple[int, tuple[Tensor, Tensor | None], Tensor]]:
        """(first element, (p, elements that may move), the update before clipping) of all blocks."""
        hyper, t = self.hyper, self.step
        beta1, beta2 = hyper.betas
        correction1, root2 = 1 - beta1**t, 1 / math.sqrt(1 - beta2**t)
        for matrix, rows, (p, grad, m, v) in self._blocks():
            assert p is not None
            assert grad is not None
            g, keep = self._gradient(grad)
            first = matrix * self.m
            span = slice(first + rows.start, first + rows.stop)
            if self.kept_rows is not None:
                keep = ~self.kept_rows[span, None]
            elif keep is not None and write:
                self.skipped += int(keep.logical_not().sum())
            if m is not None:
                new_m = torch.lerp(m, g, 1 - beta1)
                if write:
                    m.copy_(new_m if keep is None else torch.where(keep, new_m, m))
                update = new_m / correction1
            elif self.factors:
                update = self._debiased(self.factors[matrix], rows, g, correction1)
            else:
                update = g
            if v is not None:
                new_v = torch.lerp(v, g * g, 1 - beta2)
                if write:
                    v.copy_(new_v if keep is None else torch.where(keep, new_v, v))
            else:
                new_v = torch.ones((), device=g.device)
                if self.rows is not None:
                    new_v = new_v * self.rows[span, None]
                if self.cols is not None:
                    new_v = new_v * self.cols[matrix]
            update = update / new_v.sqrt().mul_(root2).add_(hyper.eps)
            # where there has been no gradient yet, nothing is to be made up for
            yield span.start * self.n, (p, keep), torch.where(new_v < TINY, 0.0, update)

    def _debiased(self, factors: _Factors, rows: slice, g: Tensor, correction: float) -> Tensor:
        """gamma g + [gamma b / (1 - b) L', c L] [R'; R], L' and R' those before: one product of depth 2 r."""
        beta, gamma = self.hyper.betas[0], self.hyper.rule.residual_scale
        (old_left, old_right), (left, right) = factors
        carry = gamma * beta / (1 - beta)
        # 1 / (1 - b^t) - gamma / (1 - b), and 0 without a rounding error in the first step
        weight = ((1 - gamma) - carry * (1 - beta ** (self.step - 1))) / correction
        both = torch.cat([carry * old_left[rows], weight * left[rows]], 1)
        return torch.addmm(g, both, torch.cat([old_right, right]), beta=gamma)


def _pieces(*tensors: Tensor | None, first: int = 0) -> Iterator[tuple[int, list[Tensor | None]]]:
    """Views of two dimensions, all of [rows, n], and the number of the first row."""
    shape = next(t.shape for t in tensors if t is not None)
    if math.prod(shape) == 0:
        return
    if len(shape) <= 2:
        # a vector is one row
        yield (
            first,
            [None if t is None else t if t.ndim == 2 else t.view(1, 1) if t.ndim == 0 else t[None] for t in tensors],
        )
        return
    rows = math.prod(shape[1:-1])
    for i in range(shape[0]):
        yield from _pieces(*(None if t is None else t[i] for t in tensors), first=first + i * rows)
