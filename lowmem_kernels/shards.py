"""Parameters in pieces, one in each of several processes: where in the whole a piece is, and over whom sums go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Adds up a float32 vector over processes, in place. Each of them calls it with a vector of the same length, and all
#: get the same bits.
Sum = Callable[[Tensor], object]


@dataclass(frozen=True)
class Shard:
    """Which elements of a whole tensor a shard of it has: those of a box, or of several at equal distances.

    Element i of the shard, in row-major order, is element ``first + sum_k i_k stride_k`` of the whole, likewise, where
    the digits i_k of i are those in mixed radix of the sizes.

    Attributes:
        first: index of the shard's first element in the whole.
        extents: (size, stride in the whole) of each digit, outermost first, none of which can be merged with the next.
    """

    first: int
    extents: tuple[tuple[int, int], ...]

    @property
    def is_range(self) -> bool:
        """Whether the elements follow each other in the whole, too."""
        return not self.extents or (len(self.extents) == 1 and self.extents[0][1] == 1)

    def indices(self, start: int, count: int, device: torch.device) -> Tensor:
        """Return the int64 indices in the whole of elements ``start .. start + count - 1`` of the shard."""
        index = torch.arange(start, start + count, device=device)
        places = torch.full_like(index, self.first)
        for size, stride in reversed(self.extents[1:]):
            places += index % size * stride
            index = index // size
        return places.add_(index, alpha=self.extents[0][1] if self.extents else 1)

    def entries(self) -> tuple[int, ...]:
        """Return what tables hold: first, outermost stride, number of other digits, (size, stride) of those, reversed.

        The outermost size is not there, since no index goes beyond it.
        """
        outer, inner = self.extents[:1], self.extents[1:]
        others = [number for extent in reversed(inner) for number in extent]
        return (self.first, outer[0][1] if outer else 1, len(inner), *others)


@dataclass(frozen=True)
class Spread:
    """How the parameters of a list are spread over processes, each of which calls the verb with the pieces it has.

    All are cut alike: what is said of sums holds for each of them. Rows and columns are those of a verb's matrices: the
    last two dimensions, or with ``conv`` the first and all others; a vector is one row. Every process calls every sum,
    as often as the others and with as long a vector, whether its pieces have elements or not.

    Attributes:
        shapes: of the whole parameters, each with the dimensions of its piece.
        shards: which elements of the whole each piece has; None: all of them, some of the first in order, or none.
        sum_rows: over the processes that have the other rows of the same columns; None where columns are whole.
        sum_cols: over the processes that have the other columns of the same rows; None where rows are whole.
        sum_pieces: over all processes that have other pieces of the same parameters, matrices of a stack included.
    """

    shapes: tuple[tuple[int, ...], ...]
    shards: tuple[Shard | None, ...]
    sum_rows: Sum | None
    sum_cols: Sum | None
    sum_pieces: Sum
