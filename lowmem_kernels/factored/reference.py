"""The factored rules in torch: the specification of the kernels, and the path that CPUs take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..blocks import Scratch, as_fp32, found_inf, read_gradient, store_
from ..options import GradTransform, Rounding
from ..rounding import stream_key
from .moments import FactoredMoment, Moment, moment_of
from .rule import FactoredRule


@torch.no_grad()
def factored_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    rule: FactoredRule,
    exp_avgs: Sequence[Tensor] | None = None,
    param_sums: Sequence[Tensor] | None = None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.factored.factored_update_`."""
    lr, scratch = float(lr), Scratch(2)
    for i, step, key, moment in _clipped(params, grads, rows, cols, steps, rule, transform, rounding, scratch):
        param, new_squares = params[i], 0.0
        carried = param_sums[i] if param_sums is not None and rule.scale_parameter else None
        rate = {"constant": lr, "rsqrt": min(lr, step**-0.5), "warmup": min(lr * step, step**-0.5)}[rule.lr_schedule]
        if rule.scale_parameter:
            squares = math.nan if carried is None else carried.item()
            if math.isnan(squares):
                squares = _squares(param, moment, scratch)
            rate *= max(rule.eps[1], math.sqrt(squares / param.numel()))
        decay = weight_decay * (rate if rule.scale_decay else lr)
        one = steps[i].new_ones(())
        moment.scale(rate)
        p_key, m_key = stream_key(key, step, 0), stream_key(key, step, 1)
        tensors = [param, grads[i]] if exp_avgs is None else [param, grads[i], exp_avgs[i]]
        for start, part, (p, grad, *exp_avg) in moment.blocks(*tensors):
            u, v = scratch.like(p)
            x, y = moment.update(read_gradient(grad, transform, u)[0], part, u)
            if rule.beta1 is not None:
                x, y = _move(exp_avg[0], x.mul_(y), rule.beta1, v), one
                # what p gets is not rounded, and stochastic rounding would overwrite it
                store_(exp_avg[0], u.copy_(x) if x is v else x, rounding.stochastic, m_key, start)
                u, v = v, u
            _subtract(p, x, y, decay, (v, u), rounding.stochastic, p_key, start)
            if carried is not None:
                new_squares += moment.squares(p, u)  # while the block is in the cache
        moment.commit()
        if carried is not None:
            carried.fill_(new_squares)


@torch.no_grad()
def confidence_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    res_rows: Sequence[Tensor | None],
    res_cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float, float],
    eps: tuple[float, float],
    clip_threshold: float,
    weight_decay: float,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.factored.confidence_update_`."""
    lr, (beta1, beta2, beta3), scratch = float(lr), betas, Scratch(2)
    rule = FactoredRule(eps=(eps[0], 0.0), beta2=beta2, clip_threshold=clip_threshold)
    for i, step, key, moment in _clipped(params, grads, rows, cols, steps, rule, transform, rounding, scratch):
        param, exp_avg, res_row, res_col = params[i], exp_avgs[i], res_rows[i], res_cols[i]
        p_key, m_key = stream_key(key, step, 0), stream_key(key, step, 1)
        residual = None
        if res_row is not None and res_col is not None:
            residual = _Residual(param, res_row, res_col, 1 - beta3, eps[1])
        for start, part, (grad, m) in moment.blocks(grads[i], exp_avg):
            u, v = scratch.like(m)
            x, y = moment.update(read_gradient(grad, transform, u)[0], part, u)
            update = x.mul_(y)
            new = _move(m, update, beta1, v)
            if residual is not None:
                residual.add(update.sub_(new).square_(), start)
            store_(m, new, rounding.stochastic, m_key, start)
        moment.commit()
        if residual is not None:
            residual.finish(lr)
        rate = steps[i].new_tensor(lr)
        for start, part, (p, m) in (residual or moment).blocks(param, exp_avg):
            u, v = scratch.like(p)
            x, y = as_fp32(m, u), rate
            if residual is not None:
                x, y = residual.update(x, part, u)
            _subtract(p, x, y, weight_decay * lr, (v, u), rounding.stochastic, p_key, start)


class _Residual(FactoredMoment):
    """CAME's second factored moment, of the squared distance of the update from its momentum."""

    def __init__(self, param: Tensor, row: Tensor, col: Tensor, weight: float, eps: float) -> None:
        super().__init__(param, row, col, weight, eps, floor=False)
        self.sums = torch.zeros_like(self.col)

    def add(self, squares: Tensor, start: int) -> None:
        """Take in a block of squares. Rows are complete in it, columns are not."""
        matrix, row = divmod(start // self.m, self.n)
        matrices = slice(matrix, matrix + len(squares))
        self.row[matrices, row : row + squares.shape[1]].lerp_(squares.mean(-1, keepdim=True) + self.added, self.weight)
        self.sums[matrices] += squares.sum(-2, keepdim=True)

    def finish(self, lr: float) -> None:
        """Make `update` return lr times the momentum over its instability."""
        self.col.lerp_(self.sums / self.n + self.added, self.weight)
        self.row_scale = (self.row / self.row.mean(1, keepdim=True)).rsqrt_().mul_(lr)
        self.col_scale = self.col.rsqrt()


def _clipped(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    rule: FactoredRule,
    transform: GradTransform,
    rounding: Rounding,
    scratch: Scratch,
) -> Iterator[tuple[int, int, int, Moment]]:
    """(position, step, noise key, moment that has seen the gradient and clips) of all parameters to be updated."""
    if found_inf(transform):
        return
    for i, (param, key) in enumerate(zip(params, rounding.keys(len(params)), strict=True)):
        step = int(steps[i]) + 1
        if param.numel() == 0:
            steps[i].add_(1)
            continue
        moment = moment_of(param, rows[i], cols[i], step, rule)
        squares = moment.look(grads[i], transform, scratch)
        if transform.skip_nonfinite and not math.isfinite(squares):
            if transform.skipped is not None:
                transform.skipped.add_(1)
            continue
        steps[i].add_(1)
        rms = math.sqrt(squares / max(param.numel(), 1))
        excess = rms / rule.clip_threshold
        moment.scale(1.0 if excess <= 1 else 1 / excess)  # NaN where that is
        yield i, step, key, moment


def _move(exp_avg: Tensor, update: Tensor, beta1: float, out: Tensor) -> Tensor:
    """Return a block of the momentum moved towards the update, before rounding: itself if it is fp32, else ``out``."""
    return as_fp32(exp_avg, out).lerp_(update, 1 - beta1)


def _subtract(
    p: Tensor, x: Tensor, y: Tensor, decay: float, scratch: Sequence[Tensor], stochastic: bool, key: int, start: int
) -> None:
    """``p -= x y + decay p`` in one subtraction and one rounding. The second scratch tensor may hold x or y."""
    value = as_fp32(p, scratch[0])
    if decay:
        value.sub_(torch.mul(x, y, out=scratch[1]).add_(value, alpha=decay))
    else:
        value.addcmul_(x, y, value=-1)
    store_(p, value, stochastic, key, start)


def _squares(param: Tensor, moment: Moment, scratch: Scratch) -> float:
    """Return the sum of p² as it would be carried, in fp32."""
    total = sum(moment.squares(block, scratch.like(block)[0]) for _, _, (block,) in moment.blocks(param))
    return torch.tensor(total, dtype=torch.float32).item()
