"""The order of tickets: each once, none before what it waits for, and as near to its gradient as the plan says."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from lowmem_kernels.device import HOPPER, DeviceFacts
from lowmem_kernels.tickets import COMPLETED, FIRST_BUNDLE, SEGMENT, Order, Stage, bundles_of, plan_order, ticket_list

LOOK, COLUMNS, APPLY = range(3)
#: Five parameters, one of which has no column phase.
OWNERS = [
    [Stage(LOOK, looks, False), *([Stage(COLUMNS, columns, False)] if columns else []), Stage(APPLY, looks, True)]
    for looks, columns in ((4, 2), (1, 1), (3, 0), (6, 3), (2, 2))
]
PLAIN = Order(bundle_bytes=0, ahead=0, reverse=False, phased=False)
BUNDLES = {
    "alone": [range(i, i + 1) for i in range(5)],
    "together": [range(5)],
    "mixed": [range(2), range(2, 3), range(3, 5)],
}
ORDERS = {
    "plain": PLAIN,
    "ahead": replace(PLAIN, ahead=2),
    "far_ahead": replace(PLAIN, ahead=100, reverse=True),
    "phased": replace(PLAIN, phased=True),
}


def read(tickets):
    """(segments as dicts, [(segment, index)] of the tickets)."""
    segments = tickets.values[tickets.segments_start :].reshape(-1, len(SEGMENT)).tolist()
    words = tickets.values[: tickets.segments_start]
    listed = list(zip((words >> 32).tolist(), (words & 0xFFFFFFFF).tolist(), strict=True))
    return [dict(zip(SEGMENT, row, strict=True)) for row in segments], listed


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bundles", BUNDLES)
def test_no_ticket_comes_before_what_it_waits_for(bundles, order):
    """As the kernels do: wait, work, arrive; the last of a segment lets others go on; the last of all resets."""
    found = ticket_list(OWNERS, BUNDLES[bundles], COLUMNS, ORDERS[order])
    segments, tickets = read(found)
    counters = np.zeros(found.counters, int)
    done = set()
    for s, index in tickets:
        segment = segments[s]
        assert counters[segment["wait"]] >= segment["target"]
        # what the wait is for: the phase before of the same parameter
        stages = OWNERS[segment["owner"]]
        place = [stage.phase for stage in stages].index(segment["phase"])
        if place:
            before = next(
                i
                for i, other in enumerate(segments)
                if (other["owner"], other["phase"]) == (segment["owner"], stages[place - 1].phase)
            )
            assert {(before, i) for i in range(stages[place - 1].tickets)} <= done
        assert (s, index) not in done
        done.add((s, index))
        counters[segment["done"]] += 1
        if counters[segment["done"]] == segment["count"]:
            if segment["then"]:
                counters[segment["then"]] += 1
            if segment["then"] != COMPLETED:
                counters[segment["done"]] += 1
    assert done == {(s, i) for s, segment in enumerate(segments) for i in range(segment["count"])}
    assert counters[COMPLETED] == len(OWNERS)
    assert [(segment["owner"], segment["phase"], segment["count"]) for segment in segments] == [
        (k, stage.phase, stage.tickets) for k, stages in enumerate(OWNERS) for stage in stages
    ]


@pytest.mark.parametrize("bundles", BUNDLES)
def test_the_scratch_of_a_bundle_is_free_before_the_next_but_one(bundles):
    segments, _ = read(ticket_list(OWNERS, BUNDLES[bundles], COLUMNS, PLAIN))
    for b, bundle in enumerate(BUNDLES[bundles]):
        looks = [segment for segment in segments if segment["owner"] in bundle and segment["phase"] == LOOK]
        if b < 2:
            assert all(look["target"] == 0 for look in looks)
            continue
        before = BUNDLES[bundles][b - 2]
        freeing = [s for s in segments if s["then"] == FIRST_BUNDLE + b - 2]
        assert [s["owner"] for s in freeing] == list(before)
        # the last phase that may use the scratch, of each parameter
        assert [s["phase"] for s in freeing] == [LOOK if k == 2 else COLUMNS for k in before]
        assert all((look["wait"], look["target"]) == (FIRST_BUNDLE + b - 2, len(before)) for look in looks)


def phases_of(order, bundles="alone"):
    segments, tickets = read(ticket_list(OWNERS, BUNDLES[bundles], COLUMNS, order))
    return [(segments[s]["owner"], segments[s]["phase"], index) for s, index in tickets]


def test_phase_follows_phase_within_a_bundle():
    assert phases_of(PLAIN)[:10] == [
        *((0, LOOK, i) for i in range(4)), *((0, COLUMNS, i) for i in range(2)), *((0, APPLY, i) for i in range(4)),
    ]  # fmt: skip
    together = [phase for _, phase, _ in phases_of(PLAIN, "together")]
    assert together == sorted(together)


def test_backwards_is_what_was_read_last():
    backwards = replace(PLAIN, reverse=True)
    assert phases_of(backwards)[6:10] == [(0, APPLY, i) for i in (3, 2, 1, 0)]
    applied = [ticket for ticket in phases_of(backwards, "together") if ticket[1] == APPLY]
    looked = [ticket for ticket in phases_of(backwards, "together") if ticket[1] == LOOK]
    assert [(k, i) for k, _, i in applied] == [(k, i) for k, _, i in looked][::-1]


def test_tickets_ahead_are_of_the_next_bundle():
    """Two between two phases, so four in all; the rest after the bundle; none where there is no next one."""
    owners = [[Stage(LOOK, 6, False), Stage(COLUMNS, 1, False), Stage(APPLY, 6, False)] for _ in range(2)]
    found = ticket_list(owners, [range(1), range(1, 2)], COLUMNS, replace(PLAIN, ahead=2))
    segments, tickets = read(found)
    order = [(segments[s]["owner"], segments[s]["phase"]) for s, _ in tickets]
    expected = [
        *[(0, LOOK)] * 6, *[(1, LOOK)] * 2, (0, COLUMNS), *[(1, LOOK)] * 2, *[(0, APPLY)] * 6,
        *[(1, LOOK)] * 2, (1, COLUMNS), *[(1, APPLY)] * 6,
    ]  # fmt: skip
    assert order == expected
    assert [index for s, index in tickets if segments[s]["owner"] == 1][:6] == list(range(6))


@pytest.mark.parametrize("bundles", BUNDLES)
def test_launches_of_the_phased_form(bundles):
    """Ranges that follow each other, one phase of one bundle each; otherwise one range."""
    found = ticket_list(OWNERS, BUNDLES[bundles], COLUMNS, ORDERS["phased"])
    segments, tickets = read(found)
    assert found.launches[0].start == 0
    assert found.launches[-1].stop == len(tickets)
    assert all(a.stop == b.start for a, b in pairwise(found.launches))
    for launch in found.launches:
        assert len({segments[s]["phase"] for s, _ in tickets[launch.start : launch.stop]}) == 1
    # bundles, each with its phases; the third parameter has no columns
    assert len(found.launches) == sum(2 if list(bundle) == [2] else 3 for bundle in BUNDLES[bundles])
    assert ticket_list(OWNERS, BUNDLES[bundles], COLUMNS, PLAIN).launches == (range(len(tickets)),)


def test_bundles_keep_to_both_limits():
    order = replace(PLAIN, bundle_bytes=100)
    sizes, scratch = [40, 40, 40, 300, 10, 10], [1, 1, 1, 1, 50, 60]
    assert bundles_of(sizes, scratch, order, 100) == [range(2), range(2, 3), range(3, 4), range(4, 5), range(5, 6)]
    assert bundles_of(sizes, scratch, order, 110) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    assert bundles_of([1], [1], order, 0) == [range(1)]


def test_plans_are_functions_of_device_facts():
    """Half a wave ahead, in two parts, of 132 processors with two programs each; AMD in launches of phases."""
    assert plan_order(HOPPER) == Order(bundle_bytes=50 * 2**20 // 4, ahead=66, reverse=True, phased=False)
    small = plan_order(DeviceFacts(name="small", sm_count=20, l2_bytes=4 << 20, warp_size=32))
    assert small == Order(bundle_bytes=1 << 20, ahead=10, reverse=True, phased=False)
    amd = plan_order(DeviceFacts(name="gfx942", sm_count=304, l2_bytes=4 << 20, warp_size=64))
    assert amd.phased
    assert amd.ahead == 0
