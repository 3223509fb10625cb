"""Every optimizer on two streams at once, and in memory that was full of NaN: the bits of a run alone."""

import pytest
import torch

from lowmem_kernels.testing import assert_same_bits
from lowmem_optim.cli.contenders import make_tensors, ours, parameters

DEVICE = torch.device("cuda")
CONTENDERS = {each.name: each for each in ours([], torch.bfloat16) if "nearest" not in each.name}
SHAPES = {"matrix": (300, 520), "vector": (520,), "stack": (6, 24, 40), "ragged": (1030, 517), "tall": (4000, 24)}
STEPS, PAIRS = 3, 5
#: cuBLAS, which multiplies SWAN's matrices, promises equal bits on one stream only.
NOT_ON_STREAMS = ("SWAN",)


def made(name):
    params = parameters(*make_tensors(SHAPES, torch.bfloat16, DEVICE))
    return params, CONTENDERS[name].make(params)


def stepped(name):
    params, optimizer = made(name)
    for _ in range(STEPS):
        optimizer.step()
    return params


def assert_same(actual, expected):
    for name, a, b in zip(SHAPES, actual, expected, strict=True):
        assert_same_bits(a.detach(), b.detach(), name)


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name not in NOT_ON_STREAMS])
def test_two_streams_at_once(name):
    """Each stream has counters, tables and scratch of its own, and programs of both are on the device together."""
    expected = stepped(name)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(PAIRS):
        pair = [made(name) for _ in streams]
        torch.cuda.synchronize()
        for _ in range(STEPS):
            for stream, (_, optimizer) in zip(streams, pair, strict=True):
                with torch.cuda.stream(stream):
                    optimizer.step()
        torch.cuda.synchronize()
        for params, _ in pair:
            assert_same(params, expected)


@pytest.mark.parametrize("name", CONTENDERS)
def test_memory_that_was_full_of_nan(name, monkeypatch):
    """In memory of torch's allocator as it was left, with nothing between steps that fills it."""
    expected = stepped(name)
    monkeypatch.undo()  # conftest's filling of torch.empty
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    poison = [torch.full((2**size,), torch.nan, device=DEVICE) for size in range(7, 25) for _ in range(4)]
    del poison
    assert_same(stepped(name), expected)
