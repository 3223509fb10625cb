"""Rounding noise of shards, in the kernels: that of the elements that they are in the whole."""

from shard_buckets import assert_shards_have_the_bits_of_the_whole, each_box, each_verb


@each_verb
@each_box
def test_shards_have_the_bits_of_the_whole(verb, name):
    assert_shards_have_the_bits_of_the_whole(verb, name, "triton")
