"""The factored rules in torch: the specification of the kernels, and the path that CPUs take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..blocks import read_gradient, store_
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
    lr = float(lr)
    for i, step, key, moment in _clipped(params, grads, rows, cols, steps, rule, transform, rounding):
        param = params[i]
        rate = {"constant": lr, "rsqrt": min(lr, step**-0.5), "warmup": min(lr * step, step**-0.5)}[rule.lr_schedule]
        if rule.scale_parameter:
            rate *= max(rule.eps[1], math.sqrt(moment.squares(param) / param.numel()))
        decay = weight_decay * (rate if rule.scale_decay else lr)
        moment.scale(rate)
        tensors = [param, grads[i]] if exp_avgs is None else [param, grads[i], exp_avgs[i]]
        for start, place, (p, grad, *exp_avg) in moment.blocks(*tensors):
            update = moment.update(read_gradient(grad, transform)[0], place)
            if rule.beta1 is not None:
                update = _moved(exp_avg[0], update, rule.beta1, key, step, start, rounding)
            _subtract(p, update, decay, key, step, start, rounding)
        moment.commit()


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
    lr, (beta1, beta2, beta3) = float(lr), betas
    rule = FactoredRule(eps=(eps[0], 0.0), beta2=beta2, clip_threshold=clip_threshold)
    for i, step, key, moment in _clipped(params, grads, rows, cols, steps, rule, transform, rounding):
        param, exp_avg, res_row, res_col = params[i], exp_avgs[i], res_rows[i], res_cols[i]
        residual = None
        if res_row is not None and res_col is not None:
            residual = _Residual(param, res_row, res_col, 1 - beta3, eps[1])
        for start, place, (grad, m) in moment.blocks(grads[i], exp_avg):
            update = moment.update(read_gradient(grad, transform)[0], place)
            new_m = _moved(m, update, beta1, key, step, start, rounding)
            if residual is not None:
                residual.add(update.sub_(new_m).square_(), place)
        moment.commit()
        if residual is not None:
            residual.finish()
        for start, place, (p, m) in moment.blocks(param, exp_avg):
            confident = m.float() if residual is None else residual.update(m.float(), place)
            _subtract(p, confident * lr, weight_decay * lr, key, step, start, rounding)


class _Residual(FactoredMoment):
    """CAME's second factored moment, of the squared distance of the update from its momentum."""

    def __init__(self, param: Tensor, row: Tensor, col: Tensor, weight: float, eps: float) -> None:
        super().__init__(param, row, col, weight, eps, floor=False)
        self.sums = torch.zeros_like(self.col)

    def add(self, squares: Tensor, place: tuple[slice, ...]) -> None:
        """Take in a block of squares. Rows are complete in it, columns are not."""
        matrices, rows = place
        self.row[matrices, rows] = torch.lerp(self.row[matrices, rows], squares.mean(-1) + self.added, self.weight)
        self.sums[matrices] += squares.sum(-2)

    def finish(self) -> None:
        self.col.lerp_(self.sums / self.n + self.added, self.weight)
        self.row_scale = (self.row / self.row.mean(-1, keepdim=True)).rsqrt()
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
) -> Iterator[tuple[int, int, int, Moment]]:
    """(position, step, noise key, moment that has seen the gradient and clips) of all parameters to be updated."""
    if transform.found_inf is not None and transform.found_inf.item() != 0:
        return
    for i, (param, key) in enumerate(zip(params, rounding.keys(len(params)), strict=True)):
        step = int(steps[i]) + 1
        if param.numel() == 0:
            steps[i].add_(1)
            continue
        moment = moment_of(param, rows[i], cols[i], step, rule)
        squares = moment.look(grads[i], transform)
        if transform.skip_nonfinite and not math.isfinite(squares):
            if transform.skipped is not None:
                transform.skipped.add_(1)
            continue
        steps[i].add_(1)
        rms = math.sqrt(squares / max(param.numel(), 1))
        moment.scale(1 / max(1.0, rms / rule.clip_threshold))
        yield i, step, key, moment


def _moved(
    exp_avg: Tensor, update: Tensor, beta1: float, key: int, step: int, start: int, rounding: Rounding
) -> Tensor:
    """Move a block of the momentum towards the update; return it as it was before it was rounded, in new memory."""
    new = torch.lerp(exp_avg.float(), update, 1 - beta1)
    store_(exp_avg, new.clone() if rounding.stochastic else new, rounding.stochastic, stream_key(key, step, 1), start)
    return new


def _subtract(p: Tensor, update: Tensor, decay: float, key: int, step: int, start: int, rounding: Rounding) -> None:
    """``p -= update + decay p`` in one subtraction and one rounding; ``update`` may be overwritten."""
    value = p.to(torch.float32)
    value.sub_(update.add_(value, alpha=decay) if decay else update)
    store_(p, value, rounding.stochastic, stream_key(key, step, 0), start)
