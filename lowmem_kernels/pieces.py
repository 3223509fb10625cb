"""Matrices in pieces, some rows in each of several processes, and the sums over processes that verbs take."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .shards import Shard
from .table import shard_of_digits
from .tickets import Order

T = TypeVar("T")

#: Adds up a float32 vector over processes, in place. Each of them calls it with a vector of the same length, and all
#: get the same bits.
Sum = Callable[[Tensor], object]


class RowPlace(NamedTuple):
    """Some rows of a matrix: runs of the same length and distance from ``first`` on, as many as there are rows."""

    first: int
    run: int
    distance: int


@dataclass(frozen=True)
class RowPieces:
    """Matrices of which each of several processes has some rows, and calls the verb with those.

    All processes call the verb with the same matrices in the same order, and call each sum, whether they have rows or
    not. State that belongs to rows has the rows that are here; what belongs to columns, or to all of a matrix, is equal
    in all processes before and after.

    Attributes:
        rows: of each whole parameter, its dimension before the last.
        places: which of them are here.
        all_reduce: the sum over the processes.
    """

    rows: tuple[int, ...]
    places: tuple[RowPlace, ...]
    all_reduce: Sum

    def shard(self, i: int, shape: Sequence[int]) -> Shard | None:
        """Return which elements of the whole parameter i has, whose shape here this is; None: some of the first."""
        *outer, n, m = shape
        first, run, distance = self.places[i]
        if math.prod(shape) == 0:
            return None
        sizes = [math.prod(outer), n // run, run, m]
        strides = [self.rows[i] * m, distance * m, m, 1]
        return shard_of_digits(first * m, sizes, strides)


class Piece(NamedTuple):
    """What a schedule has to know of a parameter of which only some rows are here.

    rows: of the whole. place: which of them are here. first_sums, second_sums: where its numbers start in the vector
    that is added up over processes: first those of one sum of all parameters, then those of the other.
    """

    rows: int
    place: RowPlace
    first_sums: int
    second_sums: int


def whole_piece(rows: int) -> Piece:
    """Return the piece that is a whole parameter of so many rows, of which no sums are taken."""
    return Piece(rows, RowPlace(0, max(rows, 1), 0), 0, 0)


def pieces_of(
    shapes: Sequence[Sequence[int]], pieces: RowPieces, numbers: Callable[[int, int], tuple[int, int]]
) -> tuple[tuple[Piece | None, ...], tuple[int, int]]:
    """Return what schedules have to know of parameters in pieces, and how many numbers each of two sums has.

    ``shapes`` are those of what is here; ``numbers(matrices, columns)`` says how many a parameter has in each sum. None
    stands for a parameter that has no elements in any process.
    """
    found: list[Piece | None] = []
    first = second = 0
    for (*outer, _here, columns), rows, place in zip(shapes, pieces.rows, pieces.places, strict=True):
        matrices = math.prod(outer)
        if matrices * rows * columns == 0:
            found.append(None)
            continue
        found.append(Piece(rows, place, first, second))
        more = numbers(matrices, columns)
        first, second = first + more[0], second + more[1]
    return tuple([p and p._replace(second_sums=first + p.second_sums) for p in found]), (first, second)


#: Order of the tickets of pieces: all of them take a phase in one launch, and the host adds up in between.
TOGETHER = Order(bundle_bytes=1 << 62, ahead=0, reverse=True, phased=True)


#: Groups of rows of a parameter in pieces at most, whose partial sums are there for all parameters at once: 256 would
#: be 0.9 GB for Llama-7B on 8 processes. Computed, not measured; a list of many matrices has enough tickets as it is.
MAX_GROUPS = 32


def advance_empty(steps: Sequence[Tensor], empty: Sequence[bool], found_inf: Tensor | None) -> None:
    """Advance the steps of parameters that have no elements in any process, of which no kernel hears."""
    for step, nothing in zip(steps, empty, strict=True):
        if nothing:
            step.add_(1 if found_inf is None else (found_inf == 0))


def complete(update: Generator[Tensor, None, T]) -> T:
    """Return what comes of an update whose sums are complete as they are."""
    try:
        while True:
            next(update)
    except StopIteration as end:
        result: T = end.value
        return result


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
