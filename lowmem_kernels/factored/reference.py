"""The factored rules in torch: the specification of the kernels, and the path that CPUs take."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Scratch, as_fp32, found_inf, read_gradient, store_
from ..options import GradTransform, Rounding
from ..pieces import RowPieces, lockstep
from ..rounding import stream_key
from ..shards import Shard
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
    pieces: RowPieces | None = None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.factored.factored_update_`."""
    if found_inf(transform):
        return
    lr, scratch = float(lr), Scratch(2)
    keys = rounding.keys(len(params))

    def update(i: int) -> Iterator[Tensor]:
        param, piece = params[i], _piece(params[i], pieces, i)
        carried = param_sums[i] if param_sums is not None and rule.scale_parameter else None
        step, new_squares = int(steps[i]) + 1, 0.0
        moment = moment_of(param, rows[i], cols[i], step, rule, piece.rows)
        here = 0.0
        if rule.scale_parameter:
            here = math.nan if carried is None else carried.item()
            if math.isnan(here):
                here = _squares(param, moment, scratch)
        squares = yield from _look(moment, grads[i], steps[i], piece, rule, transform, scratch, here)
        if squares is None:
            return
        rate = {"constant": lr, "rsqrt": min(lr, step**-0.5), "warmup": min(lr * step, step**-0.5)}[rule.lr_schedule]
        if rule.scale_parameter:
            rate *= max(rule.eps[1], math.sqrt(squares / piece.numel))
        decay = weight_decay * (rate if rule.scale_decay else lr)
        one = steps[i].new_ones(())
        moment.scale(rate)
        p_key, m_key = stream_key(keys[i], step, 0), stream_key(keys[i], step, 1)
        tensors = [param, grads[i]] if exp_avgs is None else [param, grads[i], exp_avgs[i]]
        for start, part, (p, grad, *exp_avg) in moment.blocks(*tensors):
            u, v = scratch.like(p)
            x, y = moment.update(read_gradient(grad, transform, u)[0], part, u)
            if rule.beta1 is not None:
                x, y = _move(exp_avg[0], x.mul_(y), rule.beta1, v), one
                # what p gets is not rounded, and stochastic rounding would overwrite it
                store_(exp_avg[0], u.copy_(x) if x is v else x, rounding.stochastic, m_key, start, piece.shard)
                u, v = v, u
            _subtract(p, x, y, decay, (v, u), rounding.stochastic, p_key, start, piece.shard)
            if carried is not None:
                new_squares += moment.squares(p, u)  # while the block is in the cache
        moment.commit()
        if carried is not None:
            carried.fill_(new_squares)

    lockstep(map(update, range(len(params))), pieces)


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
    pieces: RowPieces | None = None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.factored.confidence_update_`."""
    if found_inf(transform):
        return
    lr, (beta1, beta2, beta3), scratch = float(lr), betas, Scratch(2)
    rule = FactoredRule(eps=(eps[0], 0.0), beta2=beta2, clip_threshold=clip_threshold)
    keys = rounding.keys(len(params))

    def update(i: int) -> Iterator[Tensor]:
        param, exp_avg, res_row, res_col = params[i], exp_avgs[i], res_rows[i], res_cols[i]
        piece, step = _piece(param, pieces, i), int(steps[i]) + 1
        moment = moment_of(param, rows[i], cols[i], step, rule, piece.rows)
        if (yield from _look(moment, grads[i], steps[i], piece, rule, transform, scratch, 0.0)) is None:
            if piece.rows is not None and piece.numel:
                # so that the second sum is as long whatever is skipped
                yield param.new_zeros(math.prod(param.shape[:-2]) * (param.shape[-1] + 1), dtype=torch.float32)
            return
        p_key, m_key = stream_key(keys[i], step, 0), stream_key(keys[i], step, 1)
        residual = None
        if res_row is not None and res_col is not None:
            residual = _Residual(param, res_row, res_col, 1 - beta3, eps[1], floor=False, rows=piece.rows)
        for start, part, (grad, m) in moment.blocks(grads[i], exp_avg):
            u, v = scratch.like(m)
            x, y = moment.update(read_gradient(grad, transform, u)[0], part, u)
            clipped = x.mul_(y)
            new = _move(m, clipped, beta1, v)
            if residual is not None:
                residual.add(clipped.sub_(new).square_(), start)
            store_(m, new, rounding.stochastic, m_key, start, piece.shard)
        moment.commit()
        if residual is not None:
            yield from residual.finish(lr)
        rate = steps[i].new_tensor(lr)
        for start, part, (p, m) in (residual or moment).blocks(param, exp_avg):
            u, v = scratch.like(p)
            x, y = as_fp32(m, u), rate
            if residual is not None:
                x, y = residual.update(x, part, u)
            _subtract(p, x, y, weight_decay * lr, (v, u), rounding.stochastic, p_key, start, piece.shard)

    lockstep(map(update, range(len(params))), pieces)


class _Residual(FactoredMoment):
    """CAME's second factored moment, of the squared distance of the update from its momentum."""

    sums: Tensor | None = None

    def add(self, squares: Tensor, start: int) -> None:
        """Take in a block of squares. Rows are complete in it, columns are not."""
        matrix, row = divmod(start // self.m, self.n)
        matrices = slice(matrix, matrix + len(squares))
        self.row[matrices, row : row + squares.shape[1]].lerp_(squares.mean(-1, keepdim=True) + self.added, self.weight)
        if self.sums is None:
            self.sums = torch.zeros_like(self.col)
        self.sums[matrices] += squares.sum(-2, keepdim=True)

    def finish(self, lr: float) -> Iterator[Tensor]:
        """Make `update` return lr times the momentum over its instability. Yields as `Moment.look`."""
        sums = torch.zeros_like(self.col) if self.sums is None else self.sums
        n, mean_row = self.n, self.row.mean(1, keepdim=True)
        if self.rows is not None:
            n = self.rows
            vector = torch.cat([sums.flatten(), self.row.sum(1).flatten()])
            yield vector
            totals, total_row = vector.split([sums.numel(), len(self.row)])
            sums, mean_row = totals.view(sums.shape), total_row.view(-1, 1, 1) / n
        self.col.lerp_(sums / n + self.added, self.weight)
        self.row_scale = (self.row / mean_row).rsqrt_().mul_(lr)
        self.col_scale = self.col.rsqrt()


class _Piece(NamedTuple):
    """What is here of a parameter: elements and rows of the whole, None if all rows are here; and which elements."""

    numel: int
    rows: int | None
    shard: Shard | None


def _piece(param: Tensor, pieces: RowPieces | None, i: int) -> _Piece:
    if pieces is None:
        return _Piece(param.numel(), None, None)
    outer, m = math.prod(param.shape[:-2]), param.shape[-1]
    return _Piece(outer * pieces.rows[i] * m, pieces.rows[i], pieces.shard(i, param.shape))


def _look(
    moment: Moment,
    grad: Tensor,
    step: Tensor,
    piece: _Piece,
    rule: FactoredRule,
    transform: GradTransform,
    scratch: Scratch,
    param_squares: float,
) -> Generator[Tensor, None, float | None]:
    """Let a moment see the gradient, clip, and advance the step; return the sum of p², or None if there is no update.

    Yields as `Moment.look`.
    """
    if piece.numel == 0:
        step.add_(1)
        return None
    squares, param_squares = yield from moment.look(grad, transform, scratch, param_squares)
    if transform.skip_nonfinite and not math.isfinite(squares):
        if transform.skipped is not None:
            transform.skipped.add_(1)
        return None
    step.add_(1)
    rms = math.sqrt(squares / max(piece.numel, 1))
    excess = rms / rule.clip_threshold
    moment.scale(1.0 if excess <= 1 else 1 / excess)  # NaN where that is
    return param_squares


def _move(exp_avg: Tensor, update: Tensor, beta1: float, out: Tensor) -> Tensor:
    """Return a block of the momentum moved towards the update, before rounding: itself if it is fp32, else ``out``."""
    return as_fp32(exp_avg, out).lerp_(update, 1 - beta1)


def _subtract(
    p: Tensor,
    x: Tensor,
    y: Tensor,
    decay: float,
    scratch: Sequence[Tensor],
    stochastic: bool,
    key: int,
    start: int,
    shard: Shard | None,
) -> None:
    """``p -= x y + decay p`` in one subtraction and one rounding. The second scratch tensor may hold x or y."""
    value = as_fp32(p, scratch[0])
    if decay:
        value.sub_(torch.mul(x, y, out=scratch[1]).add_(value, alpha=decay))
    else:
        value.addcmul_(x, y, value=-1)
    store_(p, value, stochastic, key, start, shard)


def _squares(param: Tensor, moment: Moment, scratch: Scratch) -> float:
    """Return the sum of p² as it would be carried, in fp32."""
    total = sum(moment.squares(block, scratch.like(block)[0]) for _, _, (block,) in moment.blocks(param))
    return torch.tensor(total, dtype=torch.float32).item()
