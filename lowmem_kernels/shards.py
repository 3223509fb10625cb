"""Parameters in pieces, one in each of several processes: where in the whole a piece is, and over whom sums go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
class RowPieces:
    """Matrices of which each of several processes has some rows, and calls the verb with those.

    All processes call the verb with the same matrices in the same order, and call each sum, whether they have rows or
    not. State that belongs to rows has the rows that are here; what belongs to columns, or to all of a matrix, is equal
    in all processes before and after.

    Attributes:
        rows: of each whole parameter, its dimension before the last.
        shards: which elements of the whole each parameter has; None: all of them, some of the first in order, or none.
        all_reduce: the sum over the processes.
    """

    rows: tuple[int, ...]
    shards: tuple[Shard | None, ...]
    all_reduce: Sum


def lockstep(updates: Iterable[Iterator[Tensor]], pieces: RowPieces | None) -> None:
    """Run updates that yield float32 vectors where they need them summed over processes.

    Without pieces one after the other, and the vectors are complete as they are. With them all together: those that
    they yield next are summed as one, in place.
    """
    if pieces is None:
        for update in updates:
            for _ in update:
                pass
        return
    running = list(updates)
    while running:
        waiting = [(update, vector) for update in running if (vector := next(update, None)) is not None]
        running = [update for update, _ in waiting]
        if waiting:
            total = torch.cat([vector.flatten() for _, vector in waiting])
            pieces.all_reduce(total)
            parts = total.split([vector.numel() for _, vector in waiting])
            for (_, vector), part in zip(waiting, parts, strict=True):
                vector.copy_(part.view(vector.shape))
