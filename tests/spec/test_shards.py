"""Shards: which elements of a whole they are, and that rounding noise is that of those."""

import pytest
import torch

from lowmem_kernels.elementwise import scaled_update_
from lowmem_kernels.rounding import noise, noise_of_shard
from lowmem_kernels.shards import Shard
from shard_buckets import BOXES, SHAPE, assert_shards_have_the_bits_of_the_whole, each_box, each_verb, shard_of

CPU = torch.device("cpu")


@each_box
def test_indices_are_those_of_the_box(name):
    box = BOXES[name]
    expected = torch.arange(torch.Size(SHAPE).numel()).view(SHAPE)[box].flatten()
    shard = shard_of(box)
    assert torch.equal(shard.indices(0, len(expected), CPU), expected)
    assert torch.equal(shard.indices(len(expected) // 2, 1, CPU), expected[len(expected) // 2 :][:1])
    assert shard.is_range == (name in ("range", "element"))


@pytest.mark.parametrize(
    "shard",
    [Shard(5, ((20, 1),)), Shard(5, ((4, 7), (5, 1))), Shard((1 << 34) - 8, ((4, 1 << 33), (5, 3)))],
    ids=["range", "pieces", "beyond-32-bits"],
)
def test_noise_is_that_of_the_elements_in_the_whole(shard):
    """Drawn one by one."""
    expected = torch.cat([noise(1234, int(i), 1, CPU) for i in shard.indices(0, 20, CPU)])
    assert torch.equal(noise_of_shard(1234, shard, 0, 20, CPU), expected)
    assert torch.equal(noise_of_shard(1234, shard, 7, 13, CPU), expected[7:])


@each_verb
@each_box
def test_shards_have_the_bits_of_the_whole(verb, name):
    assert_shards_have_the_bits_of_the_whole(verb, name, "torch")


def test_a_list_of_shards_of_another_length_is_refused():
    param = torch.ones(3)
    with pytest.raises(ValueError, match="shards has 2 entries; allowed: 1, one for each parameter"):
        scaled_update_([param], [param], [torch.zeros(())], lr=1.0, weight_decay=0.0, shards=[None, None])
    assert torch.equal(param, torch.ones(3))
