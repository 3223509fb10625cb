"""Processes that hold pieces of parameters, played by threads of which one runs at a time, and their sums."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_kernels.pieces import RowPieces, Sum
from lowmem_optim.cuts import Cut, cut_out, row_place


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

    def sum_of(self, rank: int, ranks: tuple[int, ...]) -> Sum:
        """The sum over ``ranks`` as one of them calls it."""

        def add_up(vector: Tensor) -> None:
            assert vector.is_contiguous()
            call = self._calls[rank, ranks] = self._calls.get((rank, ranks), 0) + 1
            meeting = (ranks, call)
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


def each_bad(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for NaN and Inf, as they are and where a clamp would hide an Inf."""
    test = pytest.mark.parametrize("transform", [{}, {"clip_value": 0.5}], ids=["plain", "clipped"])(test)
    return pytest.mark.parametrize("bad", [float("nan"), float("inf")])(test)


def random_tensors(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Normal numbers of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@dataclass(frozen=True)
class Rows:
    """Into how many parts the rows of matrices are cut, each part in another process.

    deal: the rows are first cut into so many pieces, of each of which a process has the same part.
    """

    processes: int
    deal: int = 1

    def cuts(self, rank: int, dim: int) -> list[Cut]:
        return [Cut(dim, self.processes, rank, self.deal)]

    def piece(self, rank: int, whole: Tensor, dim: int = -2) -> Tensor:
        """What a process has of a tensor that is cut along a dimension, in memory of its own."""
        return cut_out(whole, self.cuts(rank, dim % whole.ndim)).clone()

    def gathered(self, parts: Sequence[Tensor], like: Tensor, dim: int = -2) -> Tensor:
        """What `piece` has cut along a dimension, put together again."""
        whole = torch.empty_like(like)
        places = torch.arange(like.shape[dim])
        for rank, part in enumerate(parts):
            whole.index_copy_(dim % like.ndim, self.piece(rank, places, 0), part)
        return whole

    def runs(
        self, shapes: Sequence[Sequence[int]], make: Callable[..., Any], all_steps: Callable[..., Any]
    ) -> tuple[Any, list[Any], Meetings]:
        """(the run of one process, those of several, their meetings).

        ``make(cut)`` makes a run, where ``cut(tensor, dim)`` leaves what its process has; ``all_steps(run, pieces)``
        does its steps.
        """

        def work(rank: int, meetings: Meetings) -> Any:
            run = make(lambda tensor, dim=-2: self.piece(rank, tensor, dim))
            all_steps(run, self.of(rank, shapes, meetings))
            return run

        whole = make(lambda tensor, dim=-2: tensor.clone())
        all_steps(whole, None)
        several, meetings = together(self.processes, work)
        return whole, several, meetings

    def of(self, rank: int, shapes: Sequence[Sequence[int]], meetings: Meetings) -> RowPieces:
        """As a process hands it to a verb."""
        return RowPieces(
            rows=tuple([shape[-2] for shape in shapes]),
            places=tuple([row_place(shape[-2], self.cuts(rank, len(shape) - 2)) for shape in shapes]),
            all_reduce=meetings.sum_of(rank, tuple(range(self.processes))),
        )
