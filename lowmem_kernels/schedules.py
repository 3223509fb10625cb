"""What the schedules of all families share: a list of parameters as one table of tickets, segments and fields.

How a parameter is cut, and so the order of its sums, depends on its own shape only, never on what else is in the list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .device import launching_on
from .table import Strides, counters, strides_of, uploaded
from .tensors import remembered
from .tickets import SLOTS, Order, Stage, bundles_of, ticket_list

S = TypeVar("S")

#: Tiles that a ticket of small matrices has at most, so that a stack of thousands (convolutions) has not as many
#: programs, each of which does nothing but find its place.
SMALL_TILES = 16


class Shape(NamedTuple):
    """A tile's rows and columns."""

    rows: int
    cols: int


class Geometry(NamedTuple):
    """What a schedule depends on: a parameter's shape, and where it or its gradient is not contiguous the strides."""

    shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], tuple[int, ...]] | None


def geometries_of(tensors: Sequence[Tensor], strides: Sequence[Strides | None]) -> tuple[Geometry, ...]:
    """Return the geometries of parameters, with the strides of `table.strides_of`."""
    return tuple([Geometry(tuple(t.shape), s and s[1:]) for t, s in zip(tensors, strides, strict=True)])


class Row(ABC):
    """One parameter as a family cuts it, and what its kernels read of that: int64 fields.

    Args:
        numel: its elements.
        partial: float32 elements of scratch that it shares with others in turns.
        sizes: float32 elements of scratch of its own, by field.
        fields: all else but its key, by name.
        dims: sizes and strides of its dimensions.
        starts: where in ``dims`` which of them start, by field.
    """

    #: The family's fields in the order of its kernels, and the one that tells the place in the shared scratch.
    names: ClassVar[Sequence[str]]
    shared: ClassVar[str] = "partial"

    def __init__(
        self,
        numel: int,
        partial: int,
        sizes: Mapping[str, int],
        fields: Mapping[str, int],
        dims: list[int],
        starts: Mapping[str, int],
    ) -> None:
        self.numel, self.partial, self.dims = numel, partial, dims
        self.scratch = 0
        self._offsets, self._fields, self._starts = dict[str, int](), fields, starts
        for name, size in sizes.items():
            self._offsets[name] = self.scratch
            self.scratch += vectors(size)

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The parameter's share of each phase."""

    def values(self, key: int, scratch: int, partial: int, dims: int) -> list[int]:
        """The fields; its own scratch, its share of the common one, and its dimensions start at these places."""
        offsets = {name: scratch + offset for name, offset in self._offsets.items()}
        starts = {name: dims + start for name, start in self._starts.items()}
        fields = {"key": key, self.shared: partial, **self._fields, **offsets, **starts}
        return [fields[name] for name in self.names]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Parameters that are worked off together: which of a list, and the table for the kernels.

    ``values`` holds tickets, segments from ``segments_start`` on, fields from ``rows_start`` on, then dimensions.
    ``launches`` are ranges of tickets. ``scratch`` counts float32 elements.
    """

    members: np.ndarray
    values: np.ndarray
    segments_start: int
    rows_start: int
    launches: tuple[range, ...]
    counters: int
    scratch: int


def schedule_of(
    members: Sequence[int],
    rows: Sequence[Row],
    keys: Sequence[int],
    itemsize: int,
    frees: int,
    order: Order,
    scratch_limit: int,
) -> Schedule:
    """Return the schedule of some parameters of a list.

    Args:
        members: their places in the list.
        rows: how each is cut.
        keys: of the rounding noise of each.
        itemsize: bytes of a gradient's element.
        frees: the shared scratch is free after the last stage whose phase is at most this.
        order: of the tickets.
        scratch_limit: bytes of shared scratch of a bundle, unless one parameter needs more.
    """
    bundles = bundles_of(
        [row.numel * itemsize for row in rows], [4 * row.partial for row in rows], order, scratch_limit
    )
    tickets = ticket_list([row.stages() for row in rows], bundles, frees, order)
    slot = max(sum(rows[k].partial for k in bundle) for bundle in bundles)
    scratch = min(SLOTS, len(bundles)) * slot
    rows_start = len(tickets.values)
    dims_start = rows_start + len(rows) * len(rows[0].names)
    values, dims = list[int](), list[int]()
    for b, bundle in enumerate(bundles):
        partial = b % SLOTS * slot
        for k in bundle:
            values += rows[k].values(keys[k], scratch, partial, dims_start + len(dims))
            dims += rows[k].dims
            scratch += rows[k].scratch
            partial += rows[k].partial
    return Schedule(
        np.array(members), np.concatenate([tickets.values, np.array(values + dims, dtype=np.int64)]),
        tickets.segments_start, rows_start, tickets.launches, tickets.counters, scratch,
    )  # fmt: skip


def remembered_schedules(
    make: Callable[..., tuple[S, ...]],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    aligned: np.ndarray,
    *arguments: Hashable,
) -> tuple[S, ...]:
    """Return ``make(geometries, aligned, *arguments)`` for lists of tensors, made once for those that are `Tensors`.

    ``make`` has a memory of its own, for plain lists.
    """
    strides = strides_of(params, grads)

    def found() -> tuple[S, ...]:
        return make(geometries_of(params, strides), tuple(aligned.tolist()), *arguments)

    return remembered([params], (make, strides, aligned.tobytes(), *arguments), found)


def fields_of(schedule: Schedule, names: Sequence[str]) -> Iterator[tuple[int, dict[str, int]]]:
    """Yield the place in the list of each of a schedule's parameters, and its fields by name."""
    members, width = schedule.members.tolist(), len(names)
    rows = schedule.values[schedule.rows_start :][: len(members) * width].reshape(-1, width)
    for i, row in zip(members, rows.tolist(), strict=True):
        yield i, dict(zip(names, row, strict=True))


def cut_out(scratch: Tensor, start: int, shape: Sequence[int]) -> Tensor:
    """Return a copy of what lies in the scratch from ``start`` on."""
    return scratch[start : start + prod(shape)].view(tuple(shape)).clone()


def phase_by_phase(
    schedules: Sequence[Schedule], launches: Sequence[Callable[..., None]], device: torch.device
) -> Callable[[int, Tensor], None]:
    """Return what launches a phase of all schedules: (phase, sums_ptr).

    ``launches`` are `launch_schedule` with all that each schedule needs besides. Counters are their own, since those
    of other schedules are not 0 between two phases.
    """
    counts = [torch.zeros(schedule.counters, dtype=torch.int32, device=device) for schedule in schedules]

    def launch_phase(phase: int, sums: Tensor) -> None:
        for launch, own in zip(launches, counts, strict=True):
            launch(sums_ptr=sums, counts=own, phase=phase)

    return launch_phase


def vectors(size: int) -> int:
    """``size`` elements, rounded up so that what follows them starts at a multiple of 16 bytes."""
    return -(-size // 4) * 4


def launch_schedule(
    kernel: Any,
    schedule: Schedule,
    params: Sequence[Tensor],
    where: np.ndarray,
    scratch: Tensor,
    counts: Tensor | None = None,
    phase: int | None = None,
    **arguments: Any,
) -> None:
    """Launch a kernel over a schedule's tickets. ``where`` are the addresses of all parameters' tensors.

    Given a ``phase``, only its launch, of an order that is phased and in one bundle; ``counts`` are then counters of
    its own, 0 before the first, since other schedules may come in between.
    """
    device = params[0].device
    table = uploaded(params, schedule, schedule.values)
    pointers = uploaded(params, (schedule, "addresses"), where[schedule.members].ravel())
    if counts is None:
        counts = counters(schedule.counters, device)
    for tickets in schedule.launches if phase is None else schedule.launches[phase : phase + 1]:
        with launching_on(device):
            kernel[(len(tickets),)](
                table_ptr=table, addresses_ptr=pointers, scratch_ptr=scratch, counters_ptr=counts,
                segments_start=schedule.segments_start, rows_start=schedule.rows_start, first_ticket=tickets.start,
                owners=len(schedule.members), counters=schedule.counters, **arguments,
            )  # fmt: skip
