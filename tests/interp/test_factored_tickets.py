"""Tickets in any order that the waits allow give the same bits; in any other, a wait is not satisfied.

The interpreter runs programs one after the other, so on its own it cannot show that a wait is missing. Here the list of
tickets is changed, which is data, and the scratch is full of NaN. `races.no_races` finds missing waits in another way.
"""

from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction

from factored_buckets import DIALECTS, assert_same_buckets, make_bucket
from lowmem_kernels import GradTransform, table
from lowmem_kernels.factored import launch
from lowmem_kernels.factored.kernels import adafactor, came
from lowmem_kernels.testing import Case
from lowmem_kernels.tickets import Order
from races import UnsatisfiedWait, no_races, unsatisfied_waits_raise
from ticket_orders import late, random_order, reordered, words_of

#: One tile and layout, so one launch; two groups, three slabs, two matrices.
CASES = [Case("matrix", (17, 72)), Case("vector", (8,)), Case("stack", (2, 3, 72)), Case("last", (2, 72))]
#: A bundle for each parameter, so that the slots of the scratch are used again and again; and two more.
EACH_ALONE = Order(bundle_bytes=0, ahead=2, reverse=True, phased=False)
ORDERS = {
    "each_alone": EACH_ALONE,
    "all_together": Order(bundle_bytes=1 << 30, ahead=0, reverse=False, phased=False),
    "pairs": Order(bundle_bytes=20000, ahead=100, reverse=True, phased=False),
    "phased": Order(bundle_bytes=20000, ahead=0, reverse=True, phased=True),
}
EVERY_KERNEL = ["external", "torch", "came"]


@pytest.fixture(autouse=True)
def _fresh_caches():
    """What a test leaves in the counters after a wait was not satisfied, and its schedules, must not outlive it."""
    for cache in (launch._schedules_of, table._counters):
        cache.cache_clear()
    yield
    for cache in (launch._schedules_of, table._counters):
        cache.cache_clear()


def run(name, monkeypatch, order=EACH_ALONE, change=lambda schedule: schedule):
    """A bucket after one step of a dialect, with schedules changed; the floor of torch's is felt by some elements."""
    verb, hyper = DIALECTS[name]
    bucket = make_bucket(CASES, verb=verb)
    transform = GradTransform(clip_coef=torch.tensor(3e-3 if name == "torch" else 1.0))
    with monkeypatch.context() as patch:
        patch.setattr(launch, "plan_order", lambda facts: order)
        schedules = launch._schedules
        patch.setattr(launch, "_schedules", lambda *args: [change(found) for found in schedules(*args)])
        bucket.run(verb, backend="triton", **{**hyper, "transform": transform})
    return bucket


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_bits_do_not_depend_on_the_order(name, monkeypatch):
    """Orders of bundles, launches by phase, and random orders that keep to the waits."""
    usual = run(name, monkeypatch)
    for order in ORDERS.values():
        assert_same_buckets(run(name, monkeypatch, order), usual)
    for seed in range(3):
        with unsatisfied_waits_raise():
            shuffled = run(
                name, monkeypatch, change=lambda found, seed=seed: reordered(found, random_order(found, seed))
            )
        assert_same_buckets(shuffled, usual)


def every_violation(name, monkeypatch):
    """For each wait of a dialect, a function that runs it where it is not satisfied."""
    found = []
    run(name, monkeypatch, change=lambda schedule: found.append(schedule) or schedule)
    (schedule,) = found
    _, segments = words_of(schedule)
    for s in range(len(segments)):
        for order in late(schedule, s):
            yield lambda order=order: run(name, monkeypatch, change=lambda found: reordered(found, order))


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_every_wait_is_needed_and_there(name, monkeypatch):
    """Four parameters with a wait between any two phases, and two that wait for a slot of the scratch."""
    violations = list(every_violation(name, monkeypatch))
    phases = {"external": 3, "torch": 4, "came": 5}[name]
    of_vectors = {"external": 3, "torch": 3, "came": 4}[name]
    assert len(violations) == 3 * (phases - 1) + (of_vectors - 1) + 2
    for violated in violations:
        table._counters.cache_clear()
        with unsatisfied_waits_raise(), pytest.raises((UnsatisfiedWait, InterpreterError), match="program"):
            violated()


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_a_wait_that_is_deleted_is_found(name, monkeypatch):
    """The two tests above can fail: without waits, an order that violates one gives wrong numbers and says nothing."""
    usual = run(name, monkeypatch)
    violations = list(every_violation(name, monkeypatch))
    for module in (adafactor, came):
        monkeypatch.setattr(module, "wait_for_earlier", lambda counters_ptr, segment_ptr: None)
    wrong = 0
    with unsatisfied_waits_raise():
        for violated in violations:
            table._counters.cache_clear()
            try:
                assert_same_buckets(violated(), usual)
            except AssertionError:
                wrong += 1
    # a violation shows unless nothing is left of what was there too early: a vector's column phase only sums up
    assert wrong >= len(violations) // 2
    with pytest.raises((AssertionError, InterpreterError), match="races with"), no_races():
        run(name, monkeypatch)


def test_one_launch_and_phases_are_the_same_kernel(monkeypatch):
    """One launch where it is one; else one for each phase of each bundle, of the same function."""
    launches = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *_, **__: launches.append(self.__name__))
    for order, count in ((EACH_ALONE, 1), (replace(EACH_ALONE, phased=True, ahead=0), 3 * len(CASES))):
        launches.clear()
        run("external", monkeypatch, order)
        assert launches == ["_factored_kernel"] * count
