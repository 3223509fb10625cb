"""Multi-normalization in torch: the specification of the kernels, and the path that CPUs take."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from ..blocks import Scratch, found_inf, read_gradient, row_blocks, store_, sum_is_finite
from ..lines import as_matrices
from ..options import GradTransform, Rounding
from ..pieces import RowPieces, complete, lockstep
from ..rounding import stream_key
from ..shards import Shard
from .checks import vector_shapes
from .rule import TINY, NormRule, Sweep, keeps_elements, steps_of, sweeps_of


@torch.no_grad()
def sinkhorn_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    rule: NormRule,
    exp_avgs: Sequence[Tensor] | None = None,
    pieces: RowPieces | None = None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.multinorm.sinkhorn_update_`."""
    if found_inf(transform):
        return
    lr, keeps = float(lr), keeps_elements(rule)
    keys, scratch = rounding.keys(len(params)), Scratch(3)

    def update(i: int) -> Iterator[Tensor]:
        param, exp_avg = params[i], None if exp_avgs is None else exp_avgs[i]
        x = _X(grads[i], rule, transform, exp_avg, scratch, None if pieces is None else pieces.rows[i])
        rows, cols, finite = yield from x.scales()
        if transform.skip_nonfinite and not keeps and not finite:
            if transform.skipped is not None:
                transform.skipped.add_(1)
            return
        step = int(steps[i].add_(1))
        shard = None if pieces is None else pieces.shard(i, param.shape)
        result = _Update(rows, cols, lr * rule.scale, lr * weight_decay, keeps, transform, rounding.stochastic, shard)
        result.run(param, x, exp_avg, (stream_key(keys[i], step, 0), stream_key(keys[i], step, 1)))

    lockstep(map(update, range(len(params))), pieces)


@torch.no_grad()
def sinkhorn_scales(
    grads: Sequence[Tensor], *, rule: NormRule, transform: GradTransform
) -> tuple[list[Tensor], list[Tensor]]:
    """As `lowmem_kernels.multinorm.sinkhorn_scales`."""
    all_rows, all_cols = [], []
    for grad in grads:
        (rows, cols, _) = complete(_X(grad, rule, transform, None, Scratch(3)).scales())
        row_shape, col_shape = vector_shapes(grad, rule.conv)
        all_rows.append(rows.reshape(row_shape))
        all_cols.append(cols.reshape(col_shape))
    return all_rows, all_cols


@torch.no_grad()
def rank1_apply_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    col_scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    row_offsets: Sequence[Tensor] | None = None,
    col_offsets: Sequence[Tensor] | None = None,
    sign: bool = False,
    conv: bool = False,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.multinorm.rank1_apply_`."""
    if found_inf(transform):
        return
    lr, rule = float(lr), NormRule(norms=("sign",) if sign else ("row",), conv=conv)
    for i, key in enumerate(rounding.keys(len(params))):
        x = _X(grads[i], rule, transform, None, Scratch(3))
        step = int(steps[i].add_(1))
        rows, cols = x.row_vector(row_scales[i]), x.col_vector(col_scales[i])
        offsets = None
        if row_offsets is not None and col_offsets is not None:
            offsets = x.row_vector(row_offsets[i]), x.col_vector(col_offsets[i])
        update = _Update(rows, cols, lr, lr * weight_decay, True, transform, rounding.stochastic, None, offsets)
        update.run(params[i], x, None, (stream_key(key, step, 0), 0))


class _X:
    """What is normalized: the gradient, with its momentum and sign, as E matrices n x m, read block by block.

    What belongs to rows is [E, n, 1] here and what belongs to columns [E, 1, m]. ``whole_rows`` are those of the whole
    where only some are here.
    """

    def __init__(
        self,
        grad: Tensor,
        rule: NormRule,
        transform: GradTransform,
        exp_avg: Tensor | None,
        scratch: Scratch,
        whole_rows: int | None = None,
    ) -> None:
        self.rule, self.transform, self.scratch = rule, transform, scratch
        self.grad = as_matrices(grad, rule.conv)
        before = exp_avg is not None and not rule.momentum_after
        self.exp_avg = as_matrices(exp_avg, rule.conv) if before and exp_avg is not None else None
        self.matrices, self.n, self.m = self.grad.shape
        self.in_pieces = whole_rows is not None
        self.rows = self.n if whole_rows is None else whole_rows
        self.sign = steps_of(rule.norms).sign

    def row_vector(self, vector: Tensor) -> Tensor:
        """View a vector over rows so that it broadcasts."""
        return vector.view(self.matrices, self.n, 1)

    def col_vector(self, vector: Tensor) -> Tensor:
        """View a vector over columns so that it broadcasts."""
        return vector.view(self.matrices, 1, self.m)

    def places(self) -> Iterator[tuple[slice, slice]]:
        """Cut into blocks of whole rows: (matrices, rows)."""
        return row_blocks(self.matrices, self.n, self.m)

    def block(self, place: tuple[slice, slice]) -> tuple[Tensor, Tensor | None]:
        """Return (x, the new momentum) of a block in fp32, which lie in the scratch or are the gradient itself."""
        out, moved, _ = self.scratch.like(self.grad[place])
        x, unscaled = read_gradient(self.grad[place], self.transform, out)
        if (self.sign or self.transform.clip_value is not None) and self.transform.skip_nonfinite:
            x = torch.where(unscaled.isfinite(), x, math.nan)  # what clipping, or a sign, would hide
        momentum = None
        if self.exp_avg is not None:
            momentum = torch.add(x, self.exp_avg[place], alpha=self.rule.momentum, out=moved)
            # the momentum is needed again, x is not, but it may be the gradient itself
            x = torch.add(x, momentum, alpha=self.rule.momentum, out=out) if self.rule.nesterov else momentum
        return (torch.where(x.isnan(), x, x.sign()) if self.sign else x), momentum

    def scales(self) -> Generator[Tensor, None, tuple[Tensor, Tensor, bool]]:
        """Return s, t and whether all sums are finite. Yields what is to be summed over processes, see `lockstep`."""
        rows = self.grad.new_ones(self.matrices, self.n, 1, dtype=torch.float32)
        cols = self.grad.new_ones(self.matrices, 1, self.m, dtype=torch.float32)
        squares, kept, finite = torch.empty_like(rows), torch.ones_like(rows), True
        sweeps, last = sweeps_of(self.rule, "row")
        for sweep in (*sweeps, Sweep(True, "none")) if last else sweeps:
            old_rows, sums = rows.clone(), torch.zeros_like(cols)
            for place in self.places():
                x, _ = self.block(place)
                y = torch.mul(x, cols[place[0]], out=self.scratch.like(x)[2])
                # not a vector_norm, which adds one after the other and is off by 5e-6 after 6000 equal numbers
                squares[place] = y.square_().sum(2, keepdim=True)
                if sweep.line:
                    rows[place] = self._scale(squares[place], self.m, old_rows[place]) * kept[place]
                if sweep.sums == "cross":
                    sums[place[0]] += torch.mul(x, rows[place], out=y).square_().sum(1, keepdim=True)
            if sweep.sums == "norms":
                norms = squares.sqrt()
                total, mean = norms, norms.mean(1, keepdim=True)
                if self.in_pieces:
                    total = norms.sum(1, keepdim=True)
                    yield total
                    mean = total / self.rows
                kept = (norms >= self.rule.row_threshold * mean).float()
                rows = kept.clone()
                finite &= sum_is_finite(total)
            elif sweep.sums == "cross":
                if self.in_pieces:
                    yield sums
                cols = self._scale(sums, self.rows, cols)
                finite &= sum_is_finite(sums)
            elif sweep.sums == "total":
                total = (squares * rows.square()).sum(1, keepdim=True)
                if self.in_pieces:
                    yield total
                rows = rows * self._scale(total, self.rows * self.m, torch.ones_like(total))
                finite &= sum_is_finite(total)
        return rows, cols, finite

    def _scale(self, squares: Tensor, count: int, old: Tensor) -> Tensor:
        """sqrt(count) / norm, 0 where there is nothing. With eps, the norm of what ``old`` scales is at least eps."""
        norm = squares.sqrt()
        if self.rule.eps is not None:
            norm = torch.maximum(norm, self.rule.eps / old)
        # what has overflowed is not to vanish
        return torch.where(squares < TINY, 0.0, math.sqrt(count) / norm + 0.0 * squares)


class _Update:
    """``p -= rate (s t x + a + b) + decay p``, block by block, with the momentum of the update if there is one."""

    def __init__(
        self,
        rows: Tensor,
        cols: Tensor,
        rate: float,
        decay: float,
        keeps: bool,
        transform: GradTransform,
        stochastic: bool,
        shard: Shard | None,
        offsets: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.rows, self.cols, self.offsets = rows, cols, offsets
        self.rate, self.decay, self.keeps = rate, decay, keeps
        self.transform, self.stochastic, self.shard = transform, stochastic, shard

    def run(self, param: Tensor, x: _X, exp_avg: Tensor | None, keys: tuple[int, int]) -> None:
        """Update a parameter and its momentum."""
        target = as_matrices(param, x.rule.conv)
        momentum = None if exp_avg is None else as_matrices(exp_avg, x.rule.conv)
        for place in x.places():
            start = (place[0].start * x.n + place[1].start) * x.m
            values, moved = x.block(place)
            # in memory of its own: x may be the gradient itself
            update = values * self.rows[place] * self.cols[place[0]]
            if momentum is not None and moved is None:
                moved = torch.lerp(momentum[place].float(), update, 1 - x.rule.momentum)
                update = torch.lerp(update, moved, x.rule.momentum) if x.rule.nesterov else moved.clone()
            if self.offsets is not None:
                update += self.offsets[0][place] + self.offsets[1][place[0]]
            p = target[place]
            new = torch.sub(p, update.mul_(self.rate).add_(p, alpha=self.decay))
            stored = [(p, new, keys[0])]
            if momentum is not None and moved is not None:
                stored.append((momentum[place], moved, keys[1]))
            usable = self._usable(new)
            for tensor, value, key in stored:
                value = value if usable is None else torch.where(usable, value, tensor)
                store_(tensor, value, self.stochastic, key, start, self.shard)
        if target.data_ptr() != param.data_ptr():
            param.copy_(target.view(param.shape))

    def _usable(self, new: Tensor) -> Tensor | None:
        """Which elements may be written; None: all of them."""
        if not (self.keeps and self.transform.skip_nonfinite) or sum_is_finite(new):
            return None
        usable = new.isfinite()
        if self.transform.skipped is not None:
            self.transform.skipped.add_(usable.numel() - usable.sum())
        return usable
