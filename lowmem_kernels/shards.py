"""Where in a whole tensor the elements of a shard of it are, on which rounding noise depends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
