"""What a sequential interpreter cannot show: waits that would not end, and memory that is shared without an order."""

from collections import defaultdict
from contextlib import contextmanager

import numpy as np
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder

ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)


class UnsatisfiedWait(Exception):
    """A program waits for something that no program before it has done."""


@contextmanager
def patched(**replacements):
    """Replace methods of the interpreter; each replacement gets the original first."""
    originals = {name: getattr(InterpreterBuilder, name) for name in replacements}

    def bound(original, replacement):
        return lambda builder, *args, **kwargs: replacement(original, builder, *args, **kwargs)

    try:
        for name, replacement in replacements.items():
            setattr(InterpreterBuilder, name, bound(originals[name], replacement))
        yield
    finally:
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)


@contextmanager
def unsatisfied_waits_raise():
    """Raise where a program polls a counter a second time: nothing will change it. Waits are additions of 0."""
    polled = set()

    def set_grid_dim(original, builder, *sizes):
        polled.clear()
        original(builder, *sizes)

    def atomic(original, builder, op, pointer, value, mask, sem, scope):
        if sem == ir.MEM_SEMANTIC.ACQUIRE and not np.any(value.data):
            poll = (builder.grid_idx, int(np.ravel(pointer.data)[0]))
            if poll in polled:
                raise UnsatisfiedWait(f"program {poll[0]}")
            polled.add(poll)
        return original(builder, op, pointer, value, mask, sem, scope)

    with patched(set_grid_dim=set_grid_dim, create_atomic_rmw=atomic):
        yield


class _Order:
    """What happens before what in one launch, by vector clocks, and who has touched which address when."""

    def __init__(self):
        # what each program knows to have happened: the time of each other program, which its releases advance
        self.clocks = defaultdict(lambda: defaultdict(int))
        # what a program learns that acquires an address
        self.published = defaultdict(lambda: defaultdict(int))
        self.writes, self.reads = {}, defaultdict(dict)
        self.acquired_or_released = set()
        self.atomics = set()

    def knows(self, program, other, time):
        return program == other or self.clocks[program][other] > time

    def touch(self, program, addresses, write):
        time = self.clocks[program][program]
        for address in addresses:
            if address in self.atomics and address not in self.acquired_or_released:
                continue  # a counter that orders nothing; who sees its last value puts it back to 0
            if address in self.writes:
                assert self.knows(program, *self.writes[address]), (
                    f"{program} races with a write of {self.writes[address]}"
                )
            if write:
                for reader in self.reads.pop(address, {}).items():
                    assert self.knows(program, *reader), f"{program} races with a read of {reader}"
                self.writes[address] = (program, time)
            else:
                self.reads[address][program] = time

    def atomic(self, program, address, sem):
        self.atomics.add(address)
        if sem in ACQUIRES + RELEASES:
            self.acquired_or_released.add(address)
        mine, there = self.clocks[program], self.published[address]
        if sem in ACQUIRES:
            for other, time in there.items():
                mine[other] = max(mine[other], time)
        self.reads[address][program] = mine[program]
        if sem in RELEASES:
            mine[program] += 1
            for other, time in mine.items():
                there[other] = max(there[other], time)


@contextmanager
def no_races():
    """Assert that of two programs of a launch that touch an address, one of them writing, one happens before the other.

    That is: the first releases a counter afterwards, by an atomic operation, which the other acquires before.
    """
    order = _Order()

    def touched(pointers, mask):
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(getattr(mask, "data", mask), dtype=bool), addresses.shape)]
        return addresses.ravel().tolist()

    def set_grid_dim(original, builder, *sizes):
        order.__init__()
        original(builder, *sizes)

    def load(original, builder, pointers, mask, *args, **kwargs):
        order.touch(builder.grid_idx, touched(pointers, mask), write=False)
        return original(builder, pointers, mask, *args, **kwargs)

    def store(original, builder, pointers, value, mask, *args, **kwargs):
        order.touch(builder.grid_idx, touched(pointers, mask), write=True)
        return original(builder, pointers, value, mask, *args, **kwargs)

    def atomic(original, builder, op, pointer, value, mask, sem, scope):
        order.atomic(builder.grid_idx, int(np.ravel(pointer.data)[0]), sem)
        return original(builder, op, pointer, value, mask, sem, scope)

    with patched(
        set_grid_dim=set_grid_dim, create_masked_load=load, create_masked_store=store, create_atomic_rmw=atomic
    ):
        yield
