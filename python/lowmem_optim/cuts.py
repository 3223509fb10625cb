"""Tensors in pieces as arithmetic: which indices of each dimension are left after cuts.

Whatever the placements of a DTensor, a process has of each of its dimensions some ranges of indices, and `shard_of`
says which elements of the whole those are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise, product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_kernels.pieces import RowPlace
from lowmem_kernels.shards import Shard
from lowmem_kernels.table import shard_of_digits

#: (start, length) of indices along a dimension
Range = tuple[int, int]


class Cut(NamedTuple):
    """One cut of a dimension, in the order in which cuts are made.

    Attributes:
        dim: of the tensor.
        parts: of as many indices as there are, over their number, rounded up; the last may have fewer, or none.
        place: of the part that is here.
        deal: first cut into so many pieces; a part is then the same part of each of them.
    """

    dim: int
    parts: int
    place: int
    deal: int = 1


def ranges_of(size: int, cuts: Iterable[Cut]) -> list[Range]:
    """Return which indices of a dimension are left of 0 .. size - 1 after the cuts, which are all of that dimension."""
    ranges = [(0, size)]
    for cut in cuts:
        pieces = [_part(ranges, cut.deal, i) for i in range(cut.deal)]
        ranges = _merged([one for piece in pieces for one in _part(piece, cut.parts, cut.place)])
    return ranges


def local_shape(shape: Sequence[int], cuts: Sequence[Cut]) -> tuple[int, ...]:
    """Return the shape of what is left of a tensor after the cuts."""
    return tuple([_length(ranges_of(size, [c for c in cuts if c.dim == dim])) for dim, size in enumerate(shape)])


def shard_of(shape: Sequence[int], cuts: Sequence[Cut]) -> Shard | None:
    """Return which elements of a tensor are left after the cuts; None: all of them, or some of the first in order.

    Raises ValueError where ranges of a dimension are of several lengths or distances, here or in another place, which
    no placement of FSDP, of tensor parallel or of both together has.
    """
    for dim, size in enumerate(shape):
        _check_even(size, tuple([(c.parts, c.deal) for c in cuts if c.dim == dim]))
    if 0 in local_shape(shape, cuts):
        return None
    sizes: list[int] = []
    strides: list[int] = []
    first = 0
    for dim, size in enumerate(shape):
        stride = prod(shape[dim + 1 :])
        ranges = ranges_of(size, [c for c in cuts if c.dim == dim])
        first += ranges[0][0] * stride
        sizes += [len(ranges), ranges[0][1]]
        strides += [stride * (ranges[-1][0] - ranges[-2][0]) if len(ranges) > 1 else 0, stride]
    return shard_of_digits(first, sizes, strides)


def row_place(rows: int, cuts: Sequence[Cut]) -> RowPlace:
    """Return which rows are left after cuts that are all of rows. Raises as `shard_of`."""
    _check_even(rows, tuple([(cut.parts, cut.deal) for cut in cuts]))
    ranges = ranges_of(rows, cuts)
    if not ranges:
        return RowPlace(0, 1, 0)
    return RowPlace(*ranges[0], ranges[1][0] - ranges[0][0] if len(ranges) > 1 else 0)


def cut_out(whole: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """Return what is left of a tensor after the cuts."""
    for dim, size in enumerate(whole.shape):
        ranges = ranges_of(size, [c for c in cuts if c.dim == dim])
        if ranges != [(0, size)]:
            parts = [whole.narrow(dim, start, length) for start, length in ranges]
            whole = torch.cat(parts, dim) if parts else whole.narrow(dim, 0, 0)
    return whole


def boxes_of(shape: Sequence[int], cuts: Sequence[Cut]) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Return the boxes that are left of a tensor after the cuts: where each is in the whole, and in what is left."""
    by_dim = []
    for dim, size in enumerate(shape):
        ranges = ranges_of(size, [c for c in cuts if c.dim == dim])
        ends = [*accumulate(length for _, length in ranges)]
        here = [slice(end - length, end) for end, (_, length) in zip(ends, ranges, strict=True)]
        by_dim.append([*zip([slice(start, start + length) for start, length in ranges], here, strict=True)])
    return [(tuple([a for a, _ in box]), tuple([b for _, b in box])) for box in product(*by_dim)]


@lru_cache(maxsize=4096)
def _check_even(size: int, cuts: tuple[tuple[int, int], ...]) -> None:
    """Raise as `shard_of`, in all places or in none: processes that disagree would wait for each other."""
    if all(deal == 1 for _, deal in cuts):
        return
    for places in product(*(range(parts) for parts, _ in cuts)):
        here = [Cut(0, parts, place, deal) for (parts, deal), place in zip(cuts, places, strict=True)]
        ranges = ranges_of(size, here)
        distances = {b - a for (a, _), (b, _) in pairwise(ranges)}
        if len(distances) > 1 or len({length for _, length in ranges}) > 1:
            raise ValueError(
                f"a dimension of {size} of a parameter is cut into ranges (start, length) {ranges}; allowed: of one "
                "length and distance, as FSDP and tensor parallel make them"
            )


def _part(ranges: list[Range], parts: int, place: int) -> list[Range]:
    """Cut a sequence of indices, given as ranges, into parts and return one of them."""
    size = -(-_length(ranges) // parts)
    begin, end, taken = place * size, (place + 1) * size, []
    for start, length in ranges:
        low, high = max(begin, 0), min(end, length)
        if low < high:
            taken.append((start + low, high - low))
        begin, end = begin - length, end - length
    return taken


def _merged(ranges: list[Range]) -> list[Range]:
    """Ranges in order, with those that follow each other as one."""
    merged: list[Range] = []
    for start, length in ranges:
        if merged and sum(merged[-1]) == start:
            start, length = merged[-1][0], merged.pop()[1] + length
        merged.append((start, length))
    return merged


def _length(ranges: list[Range]) -> int:
    return sum(length for _, length in ranges)
