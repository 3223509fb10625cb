"""Ranges for profilers: every verb in one, named by verb and shapes, and none when nobody profiles."""

from contextlib import contextmanager

import pytest
import torch

from lowmem_kernels.elementwise import grad_stats, scaled_update_
from lowmem_kernels.ranges import named_ranges, range_name


@pytest.fixture
def entered():
    """(enter, log): a context that notes what enters and leaves it."""
    log = []

    @contextmanager
    def enter(name):
        log.append(name)
        yield
        log.append("end")

    return enter, log


def update(shape=(4, 3)):
    p, g, step = torch.ones(shape), torch.ones(shape), torch.zeros(())
    scaled_update_([p], [g], [step], lr=0.5, weight_decay=0.0)
    return p


def test_verbs_run_in_ranges_inside_the_block_only(entered):
    enter, log = entered
    outside = update()
    assert log == []
    with named_ranges(enter):
        inside = update()
        grad_stats([torch.ones(5), torch.ones(())])
    assert log == ["scaled_update_ float32 1 of 4x3", "end", "grad_stats float32 2 vectors", "end"]
    assert torch.equal(inside, outside)
    update()
    assert len(log) == 4


def test_blocks_nest_and_an_error_ends_them(entered):
    enter, log = entered
    with named_ranges(lambda name: pytest.fail("the inner block counts")), named_ranges(enter):
        update()
    assert len(log) == 2
    with pytest.raises(ZeroDivisionError), named_ranges(enter):
        _ = 1 / 0
    update()
    assert len(log) == 2


def test_names_are_short_and_safe():
    shapes = [(8, 2), (7,), (2, 8), (8, 2), (), (3, 4, 5)]
    name = range_name("verb_", [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes])
    assert name == "verb_ bfloat16 1 of 3x4x5, 2 of 8x2, 1 of 2x8, 2 vectors"
    assert range_name("verb_", []) == "verb_"
