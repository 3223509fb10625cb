"""Other orders of a schedule's tickets: those that keep to its waits, and those that violate one."""

from dataclasses import replace

import numpy as np

from lowmem_kernels.tickets import SEGMENT


def words_of(schedule):
    """(the segment of every ticket, segments as dicts)."""
    fields = schedule.values[schedule.segments_start : schedule.rows_start].reshape(-1, len(SEGMENT))
    segments = [dict(zip(SEGMENT, row, strict=True)) for row in fields.tolist()]
    return schedule.values[: schedule.segments_start] >> 32, segments


def reordered(schedule, order):
    values = schedule.values.copy()
    values[: schedule.segments_start] = values[: schedule.segments_start][order]
    return replace(schedule, values=values)


def awaited(segments, segment):
    """The segments that a segment waits for: the one before, or those that still use the slot of the scratch."""
    if segment["target"] == 0:
        return []
    return [s for s, other in enumerate(segments) if segment["wait"] in (other["done"], other["then"])]


def random_order(schedule, seed):
    """A random order of tickets in which each comes after those that it waits for."""
    random = np.random.default_rng(seed)
    of_ticket, segments = words_of(schedule)
    open_tickets = {s: np.flatnonzero(of_ticket == s).tolist() for s in range(len(segments))}
    order = []
    while open_tickets:
        ready = [s for s in open_tickets if not any(other in open_tickets for other in awaited(segments, segments[s]))]
        s = ready[random.integers(len(ready))]
        order.append(open_tickets[s].pop(random.integers(len(open_tickets[s]))))
        if not open_tickets[s]:
            del open_tickets[s]
    return order


def late(schedule, segment):
    """Orders in which one ticket that a segment waits for comes only after the first of its own."""
    of_ticket, segments = words_of(schedule)
    for before in awaited(segments, segments[segment]):
        early, first = np.flatnonzero(of_ticket == before)[-1], np.flatnonzero(of_ticket == segment)[0]
        order = list(range(len(of_ticket)))
        order.insert(first, order.pop(early))
        yield order
