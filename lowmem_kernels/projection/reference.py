"""Random projection and APOLLO in torch: the specification of the kernels, and the path that CPUs take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..blocks import found_inf, read_gradient, row_blocks, store_, sum_is_finite
from ..lines import as_matrices
from ..options import GradTransform, Rounding
from ..rounding import stream_key
from .draw import projection_of
from .rule import (
    NORM_EPS,
    TINY_NORM,
    ApolloRule,
    Draw,
    channel_shape,
    moment_shape,
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
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.projection.apollo_update_`."""
    if found_inf(transform):
        return
    lr, uids = float(lr), draw.uids_of(len(params))
    for i, key in enumerate(rounding.keys(len(params))):
        x = _X(grads[i], rule.rank, rule.proj_type, rule.conv, transform)
        projected, squares = x.project(projection_of(x.sides, draw, uids[i], x.grad.device))
        if transform.skip_nonfinite and not sum_is_finite(squares):
            if transform.skipped is not None:
                transform.skipped.add_(1)
            continue
        step = int(steps[i].add_(1))
        epochs[i].fill_(int(draw.epoch))
        moments = [x.as_channels(moment) for moment in (exp_avgs[i], exp_avg_sqs[i])]
        keys = [stream_key(key, step, stream) for stream in range(3)]
        normalized = _normalized(projected, moments, step, rule, rounding.stochastic, keys[1:])
        scales = _scales(normalized, projected, squares, norms[i].view(-1), rule)
        beta1, beta2 = rule.betas
        correction = math.sqrt(1 - beta2**step) / (1 - beta1**step)
        rates = scales * (lr * math.sqrt(rule.scale) * correction)
        x.apply_(params[i], rates, lr * weight_decay, rounding.stochastic, keys[0])


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
        x = _X(grad, rank, proj_type, conv, transform)
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
        x = _X(grads[i], 1, proj_type, conv, transform)
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

    def __init__(self, grad: Tensor, rank: int, proj_type: str, conv: bool, transform: GradTransform) -> None:
        self.transform, self._conv = transform, conv
        self.sides = sides_of(tuple(grad.shape), rank, proj_type, conv)
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
        self, param: Tensor, rates: Tensor, decay: float, stochastic: bool, key: int, keeps: bool = False
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
            store_(p, new, stochastic, key, (e.start * rows_of_matrix + rows.start) * columns)
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


def _normalized(
    projected: Tensor, moments: list[Tensor], step: int, rule: ApolloRule, stochastic: bool, keys: list[int]
) -> Tensor:
    """Advance the moments, rounding each once, and return M / (sqrt(V) + eps), without bias correction."""
    m = torch.lerp(moments[0].float(), projected, 1 - rule.betas[0])
    v = torch.lerp(moments[1].float(), projected.square(), 1 - rule.betas[1])
    normalized = m / (v.sqrt() + rule.eps)
    for moment, value, key in zip(moments, (m, v), keys, strict=True):
        # in the order in which they lie in memory, which the noise of rounding goes by
        right = moment.is_contiguous()
        store_(*((moment, value) if right else (moment.mT, value.mT.contiguous())), stochastic, key, 0)
    return normalized


def _scales(normalized: Tensor, projected: Tensor, squares: Tensor, norms: Tensor, rule: ApolloRule) -> Tensor:
    """Return what multiplies the channels, [E, channels], limited in growth, and write the updates' norms."""
    dims = (1, 2) if rule.scale_type == "tensor" else (2,)
    scales = normalized.square().sum(dims).sqrt() / (projected.square().sum(dims).sqrt() + NORM_EPS)
    if rule.scale_type == "tensor":
        scales = scales[:, None].expand_as(squares)
    new = (scales.square() * squares).sum(1).sqrt()
    if rule.growth_limit is not None:
        known = (norms >= TINY_NORM) & norms.isfinite()
        growth = new / (norms + NORM_EPS)
        excess = torch.where(known & (growth > rule.growth_limit), growth / rule.growth_limit, 1.0)
        new, scales = new / excess, scales / excess[:, None]
    norms.copy_(new)
    return scales
