"""Work in phases, one launch: tickets in an order in which each waits only for earlier ones.

A parameter's update goes in phases, each cut into tickets; a phase may begin when all tickets of the one before are
done. A launch has as many programs as tickets. Each program takes the next ticket from a counter, so whatever it waits
for has been taken by a program that runs already: nothing has to be resident together, and nothing can lock up.

What the programs know of this is data, one int64 vector on the device:

    word of ticket 0 | word of ticket 1 | ... | segment 0 | segment 1 | ...

A *segment* is one phase of one parameter (its fields: SEGMENT); a word is ``segment << 32 | index`` within it. The
device's part is in ticket_fragments.py.

*Order.* Parameters are worked off in bundles, small enough that a gradient read in one phase is still in the L2 cache
in the next. Within a bundle phase follows phase. Between two phases come some tickets of the next bundle's first phase
(``ahead``), so that there is work while the last programs of a phase finish. A phase that looks again at what the one
before has read goes backwards: of a bundle larger than the cache, it begins with what was read last.

*Scratch* that only the first phases need is shared: bundles take turns with two slots, and the first phase of a bundle
waits until the one before the last has left the slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .device import DeviceFacts

#: What the device knows of a segment: its parameter and phase; the counter on which it waits until it is at least
#: ``target`` (0: no wait); the counter of its finished tickets, and how many there are; the counter to which its
#: completion adds one (0: none).
SEGMENT = ("owner", "phase", "wait", "target", "done", "count", "then")

#: Counters of a launch: tickets taken, parameters completed; then one for each bundle and one for each segment.
TAKEN, COMPLETED, FIRST_BUNDLE = range(3)

#: Slots of the scratch that bundles share.
SLOTS = 2


@dataclass(frozen=True)
class Order:
    """How tickets follow each other; no result depends on it.

    bundle_bytes: of gradients in a bundle, unless one parameter has more.
    ahead: tickets of the next bundle's first phase between two phases.
    reverse: whether stages go backwards that can.
    phased: a launch for each phase of each bundle instead of one for all. The kernel is the same, and finds nothing to
        wait for.
    """

    bundle_bytes: int
    ahead: int
    reverse: bool
    phased: bool


def plan_order(facts: DeviceFacts) -> Order:
    """Return the order for a device. Computed, not measured.

    A quarter of the L2 cache for a bundle: beside it lie the parameters that stream by and the gradients read ahead.
    Matrices that are larger are bundles of their own. Ahead between two phases, half a program for each processor: at
    two programs each, and two gaps, that is half a wave. A whole one would push the bundle out of the cache: for
    4096 x 4096 bfloat16 and 50 MB, in a model of the cache that forgets the least recently used, 1.84 reads of a
    gradient from DRAM instead of 1.21 (and 1.00 without).

    Phased on AMD, whose L2 caches (several) and spinning programs have not been tried; few large bundles then.
    """
    if facts.warp_size == 64:
        return Order(bundle_bytes=1 << 62, ahead=0, reverse=True, phased=True)
    return Order(bundle_bytes=facts.l2_bytes // 4, ahead=facts.sm_count // 2, reverse=True, phased=False)


class Stage(NamedTuple):
    """A phase of one parameter: its number, which grows from stage to stage; its tickets; whether they go backwards."""

    phase: int
    tickets: int
    backwards: bool


@dataclass(frozen=True, eq=False)
class TicketList:
    """The list as the device reads it: ``values`` (int64), where segments start in it, launches, counters needed.

    A launch is a range of tickets.
    """

    values: np.ndarray
    segments_start: int
    launches: tuple[range, ...]
    counters: int


def bundles_of(sizes: Sequence[int], scratch: Sequence[int], order: Order, scratch_limit: int) -> list[range]:
    """Cut a list of parameters into bundles whose gradients' bytes and shared scratch keep to the limits.

    Args:
        sizes: bytes of the gradients.
        scratch: bytes of shared scratch.
        order: says how many bytes of gradients a bundle has.
        scratch_limit: bytes of shared scratch of a bundle, unless one parameter needs more.
    """
    starts = [0]
    size = room = 0
    for i, (bytes_, need) in enumerate(zip(sizes, scratch, strict=True)):
        if i > starts[-1] and (size + bytes_ > order.bundle_bytes or room + need > scratch_limit):
            starts.append(i)
            size = room = 0
        size += bytes_
        room += need
    return [range(*ends) for ends in pairwise([*starts, len(sizes)])]


def ticket_list(owners: Sequence[Sequence[Stage]], bundles: Sequence[range], frees: int, order: Order) -> TicketList:
    """Return the tickets of all parameters.

    Args:
        owners: the stages of each parameter, at least one; none without tickets.
        bundles: consecutive ranges of parameters.
        frees: the shared scratch is free after the last stage whose phase is at most this.
        order: in which order.
    """
    segments: list[tuple[int, ...]] = []
    counters = FIRST_BUNDLE + len(bundles) + sum(map(len, owners))
    # words of a bundle by phase
    work: list[dict[int, np.ndarray]] = []
    for b, bundle in enumerate(bundles):
        words: dict[int, list[np.ndarray]] = {}
        backwards = set[int]()
        for k in bundle:
            # the slot's last user
            wait, target = (FIRST_BUNDLE + b - SLOTS, len(bundles[b - SLOTS])) if b >= SLOTS else (0, 0)
            freeing = max(stage.phase for stage in owners[k] if stage.phase <= frees)
            for stage in owners[k]:
                done = FIRST_BUNDLE + len(bundles) + len(segments)
                last = stage is owners[k][-1]
                then = COMPLETED if last else FIRST_BUNDLE + b if stage.phase == freeing else 0
                word = np.arange(stage.tickets, dtype=np.int64) + (len(segments) << 32)
                segments.append((k, stage.phase, wait, target, done, stage.tickets, then))
                # the last one to finish a segment adds one more when what it has to do then is done
                wait, target = done, stage.tickets + 1
                words.setdefault(stage.phase, []).append(word)
                if order.reverse and stage.backwards:
                    backwards.add(stage.phase)
        phases = {phase: np.concatenate(words[phase]) for phase in sorted(words)}
        work.append({phase: listed[::-1] if phase in backwards else listed for phase, listed in phases.items()})
    pieces = list(_in_order(work, order.ahead))
    ends = np.cumsum([0, *map(len, pieces)]).tolist()
    launches = [range(*pair) for pair in pairwise(ends)] if order.phased else [range(ends[-1])]
    values = np.concatenate([*pieces, np.array(segments, dtype=np.int64).ravel()])
    return TicketList(values, ends[-1], tuple(launches), counters)


def _in_order(work: Sequence[dict[int, np.ndarray]], ahead: int) -> Iterator[np.ndarray]:
    """The words of all bundles, phase by phase, with some of the next bundle's first phase between two phases."""
    early = 0
    for phases, following in zip(work, [*work[1:], {}], strict=True):
        first, *others = phases.values()
        yield first[early:]
        early = 0
        coming = next(iter(following.values())) if following else first[:0]
        for words in others:
            if ahead:
                yield coming[early : early + ahead]
                early = min(early + ahead, len(coming))
            yield words
