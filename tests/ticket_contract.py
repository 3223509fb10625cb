"""What every family whose kernel works through tickets has to satisfy; each test module says which family it is.

The interpreter runs programs one after the other, so on its own it cannot show that a wait is missing. Here the list of
tickets is changed, which is data, and the scratch is full of NaN. `races.no_races` finds missing waits in another way.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction

from lowmem_kernels import table
from lowmem_kernels.tickets import Order
from races import UnsatisfiedWait, no_races, unsatisfied_waits_raise
from ticket_orders import late, random_order, reordered, words_of

#: A bundle for each parameter, so that the slots of the scratch are used again and again; and three more.
EACH_ALONE = Order(bundle_bytes=0, ahead=2, reverse=True, phased=False)
ORDERS = (
    Order(bundle_bytes=1 << 30, ahead=0, reverse=False, phased=False),
    Order(bundle_bytes=20000, ahead=100, reverse=True, phased=False),
    Order(bundle_bytes=20000, ahead=0, reverse=True, phased=True),
)


@dataclass(frozen=True)
class Family:
    """A family and what it is to do.

    launch: its launcher. kernels: the modules that wait. kernel: the name of what is launched.
    step: a rule's name -> a bucket after one step of it. Its parameters share one launch.
    assert_same: two buckets have the same bits.
    """

    launch: ModuleType
    kernels: tuple[ModuleType, ...]
    kernel: str
    step: Callable[[str], Any]
    assert_same: Callable[[Any, Any], None]

    def fresh_caches(self) -> Iterator[None]:
        """What a test leaves in the counters after a wait was not satisfied, and its schedules, must not outlive it."""
        self._clear_caches()
        yield
        self._clear_caches()

    def _clear_caches(self):
        for cache in (self.launch._schedules_of, table._counters):
            cache.cache_clear()

    def run(self, name, monkeypatch, order=EACH_ALONE, change=lambda schedule: schedule):
        """A bucket after one step with schedules changed."""
        with monkeypatch.context() as patch:
            patch.setattr(self.launch, "plan_order", lambda facts: order)
            made = self.launch._schedules
            patch.setattr(self.launch, "_schedules", lambda *args: [change(found) for found in made(*args)])
            return self.step(name)

    def violations(self, name, monkeypatch):
        """For each wait of a rule, a function that runs it where it is not satisfied."""
        found = []
        self.run(name, monkeypatch, change=lambda schedule: found.append(schedule) or schedule)
        (schedule,) = found
        return [
            lambda order=order: self.run(name, monkeypatch, change=lambda found: reordered(found, order))
            for s in range(len(words_of(schedule)[1]))
            for order in late(schedule, s)
        ]

    def check_orders(self, name, monkeypatch, seeds=1):
        """Orders of bundles, launches by phase, and random orders that keep to the waits give the same bits."""
        usual = self.run(name, monkeypatch)
        for order in ORDERS:
            self.assert_same(self.run(name, monkeypatch, order), usual)
        for seed in range(seeds):
            with unsatisfied_waits_raise():
                shuffled = self.run(
                    name, monkeypatch, change=lambda found, seed=seed: reordered(found, random_order(found, seed))
                )
            self.assert_same(shuffled, usual)

    def check_waits(self, name, monkeypatch, count):
        """There are as many waits, and each is missed where it is not satisfied."""
        violations = self.violations(name, monkeypatch)
        assert len(violations) == count
        for violated in violations:
            table._counters.cache_clear()
            with unsatisfied_waits_raise(), pytest.raises((UnsatisfiedWait, InterpreterError), match="program"):
                violated()

    def check_deleted_waits(self, name, monkeypatch):
        """The checks above can fail: without waits, an order that violates one gives wrong numbers and says nothing."""
        usual = self.run(name, monkeypatch)
        violations = self.violations(name, monkeypatch)
        for module in self.kernels:
            monkeypatch.setattr(module, "wait_for_earlier", lambda counters_ptr, segment_ptr: None)
        wrong = 0
        with unsatisfied_waits_raise():
            for violated in violations:
                table._counters.cache_clear()
                try:
                    self.assert_same(violated(), usual)
                except AssertionError:
                    wrong += 1
        # a violation shows unless nothing is left of what was there too early: a phase may only sum up
        assert wrong >= len(violations) // 2
        with pytest.raises((AssertionError, InterpreterError), match="races with"), no_races():
            self.run(name, monkeypatch)

    def check_launches(self, name, monkeypatch, phases):
        """One launch where it is one; else one for each phase of each bundle, of the same function."""
        launches = []
        monkeypatch.setattr(InterpretedFunction, "run", lambda self, *_, **__: launches.append(self.__name__))
        for order, count in ((EACH_ALONE, 1), (replace(EACH_ALONE, phased=True, ahead=0), phases)):
            launches.clear()
            self.run(name, monkeypatch, order)
            assert launches == [self.kernel] * count
