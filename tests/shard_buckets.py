"""Boxes of a whole parameter, and what a verb makes of them, for the tests of references and kernels."""

import pytest
import torch

from lowmem_kernels import Rounding
from lowmem_kernels.elementwise import adamw_, scaled_update_
from lowmem_kernels.shards import Shard
from lowmem_kernels.table import collapse
from lowmem_kernels.testing import assert_same_bits

SHAPE = (5, 31, 70)

#: whole rows, columns (an odd first one), a block, one element
BOXES = {
    "range": (slice(1, 4), slice(None), slice(None)),
    "columns": (slice(None), slice(None), slice(13, 50)),
    "box": (slice(2, 5), slice(3, 9), slice(7, 8)),
    "element": (slice(4, 5), slice(30, 31), slice(69, 70)),
}
each_box = pytest.mark.parametrize("name", BOXES)
each_verb = pytest.mark.parametrize("verb", ["adamw", "scaled_update"])


def shard_of(box):
    starts, stops, _ = zip(*(s.indices(size) for s, size in zip(box, SHAPE, strict=True)), strict=True)
    strides = torch.empty(SHAPE).stride()
    sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
    first = sum(start * stride for start, stride in zip(starts, strides, strict=True))
    return Shard(first, tuple(collapse(sizes, strides)))


def updated(verb, params, grads, shards, backend):
    """Parameters and, of AdamW, its states in bfloat16, after two steps with rounding noise."""
    steps = [torch.zeros(()) for _ in params]
    options = {"shards": shards, "rounding": Rounding(True, seed=3, uids=[9] * len(params)), "backend": backend}
    states = [[torch.zeros(p.shape, dtype=p.dtype) for p in params] for _ in range(2)]
    for _ in range(2):
        if verb == "adamw":
            adamw_(params, grads, *states, steps, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, **options)
        else:
            scaled_update_(params, grads, steps, lr=0.1, weight_decay=0.1, **options)
    return [params, *states]


def assert_shards_have_the_bits_of_the_whole(verb, name, backend):
    """Beside a whole parameter, and also where the shard is transposed in memory."""
    generator = torch.Generator().manual_seed(0)
    p, g = (torch.randn(SHAPE, generator=generator).bfloat16() for _ in range(2))
    box = BOXES[name]
    whole = updated(verb, [p.clone()], [g], None, backend)
    params = [p[box].clone().contiguous(), p[box].mT.clone().contiguous().mT, p.clone()]
    shards = [shard_of(box), shard_of(box), None]
    found = updated(verb, params, [g[box], g[box], g], shards, backend)
    for (expected,), (contiguous, transposed, other) in zip(whole, found, strict=True):
        assert_same_bits(contiguous, expected[box])
        assert_same_bits(transposed, expected[box])
        assert_same_bits(other, expected)
