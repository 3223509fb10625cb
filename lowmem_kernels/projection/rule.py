"""APOLLO as data: what is projected to what rank, and what its moments scale; and how projections are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..lines import matrix_shape

PROJ_TYPES = ("std", "reverse_std", "right", "left")
SCALE_TYPES = ("channel", "tensor")
SOURCES = ("gaussian", "rademacher", "torch")

#: Least rank of "rademacher": of fewer signs, two equal elements of a channel that is otherwise zero cancel too often
#: (with probability 1/2 at rank 1, 0.07 at 4), and the channel's factor is then a division by zero.
MIN_SIGNS = 8

#: Added to |R|, as in the paper's algorithm, and to the last norm where it is compared with the new one.
NORM_EPS = 1e-8

#: A last norm below it, or one that is not finite, counts as none. Norms do not depend on the gradient's scale: 1e-2
#: times the square root of the number of elements is a small one.
TINY_NORM = 1e-6


@dataclass(frozen=True)
class ApolloRule:
    """What APOLLO makes of a gradient.

    Attributes:
        rank: r, of the projected gradient; matrices with no more than r contracted elements are not projected.
        scale_type: "channel" has a factor for each channel, "tensor" one for all of a matrix.
        scale: its square root multiplies the update.
        proj_type: what is contracted. "std": the shorter dimension, of square matrices the columns. "reverse_std": the
            longer. "right": columns, so that channels are rows. "left": rows.
        betas: decay rates of the moments of the projected gradient, in [0, 1).
        eps: added to the root of the second moment, in units of the gradient, without bias correction.
        growth_limit: by how much the update's norm may grow from one step to the next, as a factor; None: any.
        conv: takes a parameter of more than two dimensions for one matrix whose columns are all dimensions but the
            first, instead of a stack of matrices over the last two.
    """

    rank: int = 256
    scale_type: str = "channel"
    scale: float = 1.0
    proj_type: str = "std"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    growth_limit: float | None = 1.01
    conv: bool = False


@dataclass(frozen=True)
class Draw:
    """Which projections are meant. Entries depend on nothing else: not on tiles, nor on what else is projected.

    Attributes:
        source: "gaussian": standard normal numbers, rounded to bfloat16. "rademacher": 1 and -1, from rank 8 on.
            "torch": `torch.randn` with a generator seeded by ``seed + uid + 1`` for epoch 1, and by a chain of numbers
            drawn from it after that, as the authors' implementation does; for comparisons, since every parameter has a
            projection of its own in memory.
        seed: the run's, any 64-bit integer.
        uids: a 64-bit integer for each parameter; None: 0, 1, 2, ... At rank 1 every parameter has a projection of its
            own, and from rank 2 on all with as many contracted elements share one, but for "torch".
        epoch: which of the parameter's projections, counted from 1; an integer or a 0-d int64 tensor.
    """

    source: str = "gaussian"
    seed: int = 0
    uids: Sequence[int] | None = None
    epoch: int | Tensor = 1

    def uids_of(self, count: int) -> Sequence[int]:
        """Return the uids of ``count`` parameters. Raises ValueError when there are more or fewer."""
        uids = range(count) if self.uids is None else self.uids
        if len(uids) != count:
            raise ValueError(f"draw.uids has {len(uids)} entries; allowed: {count}, one for each parameter")
        return uids


class Sides(NamedTuple):
    """How a parameter is projected.

    matrices, channels, contracted: of them, and of each of them.
    right: columns are contracted and channels are rows; else the other way round.
    rank: of the projected gradient.
    projected: False: the gradient stands for its projection.
    """

    matrices: int
    channels: int
    contracted: int
    right: bool
    rank: int
    projected: bool


def sides_of(shape: tuple[int, ...], rank: int, proj_type: str, conv: bool) -> Sides:
    """Return how a parameter of this shape is projected. Where it is sharded, the shape is that of the whole."""
    matrices, rows, columns = matrix_shape(shape, conv)
    right = proj_type == "right" or (proj_type != "left" and (rows >= columns) == (proj_type == "std"))
    channels, contracted = (rows, columns) if right else (columns, rows)
    return Sides(matrices, channels, contracted, right, min(rank, contracted), rank < contracted)


def piece_sides(shape: tuple[int, ...], rows: int, rule: ApolloRule) -> tuple[Sides, Sides]:
    """Return how matrices of so many rows are projected, and what of that is where some rows are, of this shape."""
    *outer, here, columns = shape
    whole = sides_of((*outer, rows, columns), rule.rank, rule.proj_type, rule.conv)
    if whole.right:
        return whole, whole._replace(channels=here)
    return whole, whole._replace(contracted=here, rank=whole.rank if whole.projected else here)


def takes_pieces(rule: ApolloRule) -> bool:
    """Say whether `apollo_update_` takes matrices whose rows are in several processes."""
    return not rule.conv


def moment_shape(shape: tuple[int, ...], rule: ApolloRule, rows: int | None = None) -> tuple[int, ...]:
    """Return the shape of the projected gradient and of its moments: [..., m, r] or [..., r, n] of an m x n matrix.

    rows: of the whole matrices, where the shape is that of some of their rows.
    """
    if rows is None:
        sides = sides_of(shape, rule.rank, rule.proj_type, rule.conv)
    else:
        _, sides = piece_sides(shape, rows, rule)
    if not sides.projected:
        return shape
    outer = () if rule.conv else shape[:-2]
    return (*outer, sides.channels, sides.rank) if sides.right else (*outer, sides.rank, sides.channels)


def norm_shape(shape: tuple[int, ...], rule: ApolloRule) -> tuple[int, ...]:
    """Return the shape of the updates' norms: one for each matrix."""
    return () if rule.conv else shape[:-2]


def channel_shape(shape: tuple[int, ...], rank: int, proj_type: str, conv: bool) -> tuple[int, ...]:
    """Return the shape of what there is for each channel."""
    outer = () if conv else shape[:-2]
    return (*outer, sides_of(shape, rank, proj_type, conv).channels)


def projected_scale(rank: int) -> float:
    """Return the factor of P: entries of variance 1 / rank keep norms, on average."""
    return 1 / math.sqrt(rank)
