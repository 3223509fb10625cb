"""Processes that hold pieces of parameters, played by threads of which one runs at a time, and their sums."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowmem_kernels.shards import Spread, Sum
from lowmem_optim.cuts import Cut, cut_out, shard_of


class Meetings:
    """What `together` gives to each process: sums over processes that all of them call, and a count of them."""

    def __init__(self, condition: threading.Condition) -> None:
        self._condition = condition
        self._arrived: dict[tuple[Any, ...], dict[int, Tensor]] = {}
        self._totals: dict[tuple[Any, ...], Tensor] = {}
        self._calls: dict[tuple[Any, ...], int] = {}
        self.failed = False
        #: (ranks, elements) of each sum, once for all of its processes
        self.sums: list[tuple[tuple[int, ...], int]] = []

    def sum_of(self, rank: int, ranks: tuple[int, ...], name: str) -> Sum:
        """The sum over ``ranks`` as one of them calls it; those of another name do not meet it."""

        def add_up(vector: Tensor) -> None:
            assert vector.is_contiguous()
            call = self._calls[rank, ranks, name] = self._calls.get((rank, ranks, name), 0) + 1
            meeting = (ranks, name, call)
            here = self._arrived.setdefault(meeting, {})
            here[rank] = vector.clone()
            if len(here) == len(ranks):
                assert len({v.numel() for v in here.values()}) == 1, "vectors of several lengths are added up"
                first, *others = (here[r] for r in ranks)
                total = first.clone()
                for other in others:
                    total += other
                self._totals[meeting] = total
                self.sums.append((ranks, vector.numel()))
                self._condition.notify_all()
            while meeting not in self._totals:
                assert self._condition.wait(timeout=60), f"process {rank} waits in vain for {ranks}"
                assert not self.failed
            vector.copy_(self._totals[meeting])

        return add_up


def together(processes: int, work: Callable[[int, Meetings], Any]) -> tuple[list[Any], Meetings]:
    """Return what ``work(rank, meetings)`` returns in each process, and the meetings.

    A process runs until it waits for others in a sum: interpreter and caches never see two at a time.
    """
    condition = threading.Condition()
    meetings = Meetings(condition)
    results: list[Any] = [None] * processes
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        with condition:
            try:
                if not meetings.failed:
                    results[rank] = work(rank, meetings)
            except BaseException as error:
                errors.append(error)
                meetings.failed = True
                condition.notify_all()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results, meetings


@dataclass(frozen=True)
class Grid:
    """Into how many parts stacks, rows and columns are cut, each part in another process.

    deal: the rows are first cut into so many pieces, of each of which a process has the same part.
    """

    outer: int = 1
    rows: int = 1
    cols: int = 1
    deal: int = 1

    @property
    def processes(self) -> int:
        return self.outer * self.rows * self.cols

    def _places(self, rank: int) -> tuple[int, int, int]:
        return rank // (self.rows * self.cols), rank // self.cols % self.rows, rank % self.cols

    def cuts(self, rank: int, ndim: int, conv: bool = False) -> list[Cut]:
        """Of a tensor of so many dimensions; what it has not is not cut, and a vector is cut by columns."""
        e, row, col = self._places(rank)
        if ndim < 2:
            return [Cut(0, self.cols, col)] if ndim else []
        where = [(0 if conv else ndim - 2, self.rows, row, self.deal), (1 if conv else ndim - 1, self.cols, col, 1)]
        if ndim > 2 and not conv:
            where.insert(0, (0, self.outer, e, 1))
        return [Cut(*one) for one in where if one[1] > 1]

    def piece(self, rank: int, whole: Tensor, conv: bool = False) -> Tensor:
        """What a process has of a tensor, in memory of its own."""
        return cut_out(whole, self.cuts(rank, whole.ndim, conv)).clone()

    def spread(self, rank: int, shapes: Sequence[tuple[int, ...]], meetings: Meetings, conv: bool = False) -> Spread:
        """As a process hands it to a verb."""
        mine, everyone = self._places(rank), range(self.processes)

        def along(axis: int, name: str) -> Sum | None:
            ranks = [
                r
                for r in everyone
                if all(a == b for i, (a, b) in enumerate(zip(self._places(r), mine, strict=True)) if i != axis)
            ]
            return meetings.sum_of(rank, tuple(ranks), name) if len(ranks) > 1 else None

        return Spread(
            shapes=tuple(shapes),
            shards=tuple([shard_of(shape, self.cuts(rank, len(shape), conv)) for shape in shapes]),
            sum_rows=along(1, "rows"),
            sum_cols=along(2, "cols"),
            sum_pieces=meetings.sum_of(rank, tuple(everyone), "pieces"),
        )
