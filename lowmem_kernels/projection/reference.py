"""Random projection and APOLLO in torch: the specification of the kernels, and the path that CPUs take."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from ..blocks import found_inf, read_gradient, row_blocks, store_, sum_is_finite
from ..lines import as_matrices
from ..options import GradTransform, Rounding
from ..pieces import RowPieces, RowPlace, lockstep
from ..rounding import stream_key
from ..shards import Shard
from .draw import places_of, projection_of
from .rule import (
    NORM_EPS,
    TINY_NORM,
    ApolloRule,
    Draw,
    Sides,
    channel_shape,
    moment_shape,
    piece_sides,
    projected_scale,
    sides_of,
)


@torch.no_grad()
def apollo_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    norms: Sequence[Tensor],
    epochs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    rule: ApolloRule,
    draw: Draw,
    pieces: RowPieces | None = None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.projection.apollo_update_`."""
    if found_inf(transform):
        return
    lr, uids = float(lr), draw.uids_of(len(params))
    round_keys = rounding.keys(len(params))

    def update(i: int) -> Iterator[Tensor]:
        shape = tuple(params[i].shape)
        whole = sides = sides_of(shape, rule.rank, rule.proj_type, rule.conv)
        if pieces is not None:
            whole, sides = piece_sides(shape, pieces.rows[i], rule)
        x = _X(grads[i], sides, rule.conv, transform)
        # where rows are contracted R is a sum over processes
        place = None if pieces is None or whole.right or not whole.projected else pieces.places[i]
        projected, squares = x.project(_drawn(whole, draw, uids[i], place, sides.contracted, x.grad.device))
        if place is not None:
            projected, squares = yield from _summed(projected, squares)
        step = int(steps[i]) + 1
        moments = [x.as_channels(moment) for moment in (exp_avgs[i], exp_avg_sqs[i])]
        values = _moved(projected, moments, rule)
        normalized = values[0] / (values[1].sqrt() + rule.eps)
        # what belongs to rows that are not here is missing
        partial = pieces is not None and place is None
        scales, norm_squares, seen = yield from _scales(normalized, projected, squares, rule, partial, whole.right)
        if transform.skip_nonfinite and not sum_is_finite(seen):
            if transform.skipped is not None:
                transform.skipped.add_(1)
            return
        steps[i].fill_(step)
        epochs[i].fill_(int(draw.epoch))
        keys = [stream_key(round_keys[i], step, stream) for stream in range(3)]
        moment_shard = pieces.shard(i, exp_avgs[i].shape) if pieces is not None and partial else None
        _store_moments_(moments, values, rounding.stochastic, keys[1:], moment_shard)
        scales = _limited(scales, norm_squares, norms[i].view(-1), rule)
        beta1, beta2 = rule.betas
        correction = math.sqrt(1 - beta2**step) / (1 - beta1**step)
        rates = scales * (lr * math.sqrt(rule.scale) * correction)
        shard = None if pieces is None else pieces.shard(i, shape)
        x.apply_(params[i], rates, lr * weight_decay, rounding.stochastic, keys[0], shard=shard)

    lockstep(map(update, range(len(params))), pieces)


@torch.no_grad()
def project(
    grads: Sequence[Tensor],
    *,
    rank: int,
    draw: Draw,
    proj_type: str = "std",
    conv: bool = False,
    transform: GradTransform,
) -> tuple[list[Tensor], list[Tensor]]:
    """As `lowmem_kernels.projection.project`."""
    projections, sums, rule = [], [], ApolloRule(rank, proj_type=proj_type, conv=conv)
    for grad, uid in zip(grads, draw.uids_of(len(grads)), strict=True):
        x = _X(grad, sides_of(tuple(grad.shape), rank, proj_type, conv), conv, transform)
        projected, squares = x.project(projection_of(x.sides, draw, uid, grad.device))
        shape = tuple(grad.shape)
        projections.append(x.from_channels(projected).reshape(moment_shape(shape, rule)))
        sums.append(squares.reshape(channel_shape(shape, rank, proj_type, conv)))
    return projections, sums


@torch.no_grad()
def channel_apply_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    proj_type: str = "std",
    conv: bool = False,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.projection.channel_apply_`."""
    if found_inf(transform):
        return
    lr = float(lr)
    for i, key in enumerate(rounding.keys(len(params))):
        x = _X(grads[i], sides_of(tuple(grads[i].shape), 1, proj_type, conv), conv, transform)
        step = int(steps[i].add_(1))
        rates = lr * scales[i].view(x.sides.matrices, x.sides.channels)
        x.apply_(params[i], rates, lr * weight_decay, rounding.stochastic, stream_key(key, step, 0), keeps=True)


def projection_matrix(
    shape: Sequence[int],
    *,
    rank: int,
    draw: Draw,
    proj_type: str = "std",
    conv: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """As `lowmem_kernels.projection.projection_matrix`."""
    sides = sides_of(tuple(shape), rank, proj_type, conv)
    matrix = projection_of(sides, draw, draw.uids_of(1)[0], torch.device(device))
    return matrix * projected_scale(sides.rank) if sides.projected else matrix


class _X:
    """A gradient as E matrices, read block by block; what belongs to channels is [E, channels] or [E, channels, r]."""

    def __init__(self, grad: Tensor, sides: Sides, conv: bool, transform: GradTransform) -> None:
        self.transform, self._conv, self.sides = transform, conv, sides
        self.grad = as_matrices(grad, self._conv)

    def project(self, projection: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected gradient [E, channels, r] and the channels' sums of squares, fp32."""
        sides, scale = self.sides, projected_scale(self.sides.rank) if self.sides.projected else 1.0
        projected = self.grad.new_zeros(sides.matrices, sides.channels, sides.rank, dtype=torch.float32)
        squares = self.grad.new_zeros(sides.matrices, sides.channels, dtype=torch.float32)
        for e, rows in self._places():
            x = self._block((e, rows))
            if sides.right:
                projected[e, rows] = x @ projection.mT if sides.projected else x
                squares[e, rows] = x.square().sum(2)
            else:
                if sides.projected:
                    projected[e] += x.mT @ projection.mT[rows]
                else:
                    projected[e, :, rows] = x.mT
                squares[e] += x.square().sum(1)
        return projected.mul_(scale), squares

    def apply_(
        self,
        param: Tensor,
        rates: Tensor,
        decay: float,
        stochastic: bool,
        key: int,
        keeps: bool = False,
        shard: Shard | None = None,
    ) -> None:
        """Subtract the gradient times the channels' rates, then decay."""
        target = as_matrices(param, self._conv)
        _, rows_of_matrix, columns = self.grad.shape
        for e, rows in self._places():
            rate = rates[e, rows, None] if self.sides.right else rates[e, None]
            p = target[e, rows]
            update = rate * self._block((e, rows))
            # what is left of p decays; in one subtraction, so that nothing moves -0
            new = p - (update + decay * (p - update))
            if keeps and self.transform.skip_nonfinite and not sum_is_finite(new):
                usable = new.isfinite()
                if self.transform.skipped is not None:
                    self.transform.skipped.add_(usable.logical_not().sum())
                new = torch.where(usable, new, p)
            store_(p, new, stochastic, key, (e.start * rows_of_matrix + rows.start) * columns, shard)
        if target.data_ptr() != param.data_ptr():
            param.copy_(target.view(param.shape))

    def as_channels(self, moment: Tensor) -> Tensor:
        """View what has the shape of a projected gradient as [E, channels, r]."""
        sides = self.sides
        if sides.right:
            return moment.view(sides.matrices, sides.channels, sides.rank)
        return moment.view(sides.matrices, sides.rank, sides.channels).mT

    def from_channels(self, projected: Tensor) -> Tensor:
        """Return [E, channels, r] as a projected gradient lies in memory."""
        return projected if self.sides.right else projected.mT.contiguous()

    def _places(self) -> Iterator[tuple[slice, slice]]:
        return row_blocks(*self.grad.shape)

    def _block(self, place: tuple[slice, slice]) -> Tensor:
        g, unscaled = read_gradient(self.grad[place], self.transform)
        if self.transform.clip_value is not None and self.transform.skip_nonfinite:
            return torch.where(unscaled.isfinite(), g, math.nan)  # what clipping would hide
        return g


def _drawn(whole: Sides, draw: Draw, uid: int, place: RowPlace | None, count: int, device: torch.device) -> Tensor:
    """Return P, or given a place the columns of it that belong to the ``count`` rows that are here."""
    projection = projection_of(whole, draw, uid, device)
    return projection if place is None else places_of(projection, place, count)


def _summed(*parts: Tensor) -> Generator[Tensor, None, list[Tensor]]:
    """Return fp32 tensors summed over the processes. Yields them as one vector."""
    vector = torch.cat([part.flatten() for part in parts])
    yield vector
    totals = vector.split([part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(totals, parts, strict=True)]


def _moved(projected: Tensor, moments: list[Tensor], rule: ApolloRule) -> tuple[Tensor, Tensor]:
    """Return the next moments, fp32, before rounding."""
    m = torch.lerp(moments[0].float(), projected, 1 - rule.betas[0])
    v = torch.lerp(moments[1].float(), projected.square(), 1 - rule.betas[1])
    return m, v


def _store_moments_(
    moments: list[Tensor], values: tuple[Tensor, Tensor], stochastic: bool, keys: list[int], shard: Shard | None
) -> None:
    """Round the moments, each once."""
    for moment, value, key in zip(moments, values, keys, strict=True):
        # in the order in which they lie in memory, which the noise of rounding goes by
        right = moment.is_contiguous()
        store_(*((moment, value) if right else (moment.mT, value.mT.contiguous())), stochastic, key, 0, shard)


def _scales(
    normalized: Tensor, projected: Tensor, squares: Tensor, rule: ApolloRule, partial: bool, right: bool
) -> Generator[Tensor, None, tuple[Tensor, Tensor, Tensor]]:
    """Return what multiplies the channels, [E, channels], the update's squared norms, [E], and sums of all squares.

    Yields once if what is here is ``partial``, of rows that are channels (``right``) or contracted.
    """
    tensor = rule.scale_type == "tensor"
    dims = (1, 2) if tensor else (2,)
    roots, seen = [normalized.square().sum(dims), projected.square().sum(dims)], squares
    if partial and (tensor or not right):
        *roots, seen = yield from _summed(*roots, squares.sum(1) if tensor else squares)
        seen = seen[:, None] if tensor else seen
    scales = roots[0].sqrt() / (roots[1].sqrt() + NORM_EPS)
    if tensor:
        scales = scales[:, None]
    norm_squares = (scales.square() * seen).sum(1)
    if partial and right and not tensor:
        norm_squares, seen = yield from _summed(norm_squares, squares.sum(1))
    return scales.expand_as(squares), norm_squares, seen


def _limited(scales: Tensor, norm_squares: Tensor, norms: Tensor, rule: ApolloRule) -> Tensor:
    """Return the channels' factors, limited in growth, and write the updates' norms."""
    new = norm_squares.sqrt()
    if rule.growth_limit is not None:
        known = (norms >= TINY_NORM) & norms.isfinite()
        growth = new / (norms + NORM_EPS)
        excess = torch.where(known & (growth > rule.growth_limit), growth / rule.growth_limit, 1.0)
        new, scales = new / excess, scales / excess[:, None]
    norms.copy_(new)
    return scales
