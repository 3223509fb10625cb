"""What a sequential interpreter cannot show: programs in another order, and programs that touch the same memory."""

from collections import defaultdict
from contextlib import contextmanager

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder


@contextmanager
def shuffled_programs(seed):
    """Run the programs of every launch in a random order."""
    random = np.random.default_rng(seed)
    original = InterpreterBuilder.set_grid_idx
    order = []

    def set_grid_idx(builder, x, y, z):
        if x == 0:
            order[:] = random.permutation(builder.grid_dim[0]).tolist()
        original(builder, order[x], y, z)

    InterpreterBuilder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = original


@contextmanager
def no_races():
    """Assert that in every launch no program touches what another one writes.

    With one exception, as in `fragments.is_last_program`: each program counts itself by an atomic operation, and what
    happens in the last one after that comes after all that the others did before theirs.
    """
    names = ("set_grid_dim", "create_masked_load", "create_masked_store", "create_atomic_rmw")
    originals = {name: getattr(InterpreterBuilder, name) for name in names}
    # of a launch: who wrote and who read an address, for what happens before a program's atomic operation and after it
    writers, readers = [defaultdict(set), defaultdict(set)], [defaultdict(set), defaultdict(set)]
    counted = set()

    def touch(builder, users, pointers, mask):
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(getattr(mask, "data", mask), dtype=bool), addresses.shape)]
        program = builder.grid_idx
        for address in addresses.ravel().tolist():
            users[program in counted][address].add(program)

    def set_grid_dim(builder, *sizes):
        check()
        originals["set_grid_dim"](builder, *sizes)

    def load(builder, pointers, mask, *args, **kwargs):
        touch(builder, readers, pointers, mask)
        return originals["create_masked_load"](builder, pointers, mask, *args, **kwargs)

    def store(builder, pointers, value, mask, *args, **kwargs):
        touch(builder, writers, pointers, mask)
        return originals["create_masked_store"](builder, pointers, value, mask, *args, **kwargs)

    def atomic(builder, *args, **kwargs):
        counted.add(builder.grid_idx)
        return originals["create_atomic_rmw"](builder, *args, **kwargs)

    def check():
        for wrote, read in zip(writers, readers, strict=True):
            for address, programs in wrote.items():
                users = programs | read[address]
                assert len(users) == 1, f"programs {sorted(users)} of a launch share an address that {programs} wrote"
        for users in (*writers, *readers, counted):
            users.clear()

    replacements = dict(zip(names, (set_grid_dim, load, store, atomic), strict=True))
    try:
        for name, replacement in replacements.items():
            setattr(InterpreterBuilder, name, replacement)
        yield
        check()
    finally:
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)
