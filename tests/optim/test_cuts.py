"""What of a tensor is where, against torch's own account of placements, without any process but this."""

from itertools import product

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from lowmem_optim.cuts import Cut, cut_out, local_shape, ranges_of, shard_of

SHAPES = [(7, 5), (1, 6), (5, 1), (12, 3), (3, 4, 5), (2, 7, 3), (6,), (1,), (0, 4), ()]
LAYOUTS = [
    ((2,), (Shard(0),)),
    ((3,), (Shard(0),)),
    ((8,), (Shard(0),)),
    ((2,), (Shard(1),)),
    ((4,), (Shard(2),)),
    ((2,), (Replicate(),)),
    ((2, 2), (Shard(0), Shard(0))),
    ((2, 2), (Replicate(), Shard(0))),
    ((2, 3), (Shard(0), Shard(1))),
    ((3, 2), (Shard(2), Shard(1))),
    ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    ((4, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    ((2, 3), (_StridedShard(1, split_factor=3), Shard(1))),
    ((2, 2, 2), (Replicate(), _StridedShard(0, split_factor=2), Shard(0))),
]


def cuts(mesh, coordinate, placements):
    return [
        Cut(p.dim, size, place, getattr(p, "split_factor", 1))
        for size, place, p in zip(mesh, coordinate, placements, strict=True)
        if not p.is_replicate()
    ]


def legal():
    for shape, (mesh, placements) in product(SHAPES, LAYOUTS):
        if all(p.is_replicate() or p.dim < len(shape) for p in placements):
            yield pytest.param(shape, mesh, placements, id=f"{shape}-{mesh}-{''.join(map(str, placements))}")


every_layout = pytest.mark.parametrize(("shape", "mesh", "placements"), list(legal()))


@every_layout
def test_shards_are_where_torch_puts_them(shape, mesh, placements):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for coordinate in product(*map(range, mesh)):
        made = cuts(mesh, coordinate, placements)
        size, offset = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)
        assert local_shape(shape, made) == tuple(size)
        here = cut_out(whole, made)
        assert tuple(here.shape) == tuple(size)
        shard = shard_of(shape, made)
        if here.numel():
            assert here.flatten()[0] == sum(o * s for o, s in zip(offset, whole.stride(), strict=True))
            indices = torch.arange(here.numel()) if shard is None else shard.indices(0, here.numel(), whole.device)
            assert torch.equal(indices, here.flatten())
        else:
            assert shard is None


@every_layout
def test_shards_together_are_the_whole(shape, mesh, placements):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [cut_out(whole, cuts(mesh, c, placements)).flatten() for c in product(*map(range, mesh))]
    copies = torch.Size([size for size, p in zip(mesh, placements, strict=True) if p.is_replicate()]).numel()
    assert torch.equal(torch.cat(parts).sort().values, whole.flatten().repeat_interleave(copies))


def test_pieces_that_are_dealt_stay_apart_and_ranges_that_meet_become_one():
    assert ranges_of(8, [Cut(0, 2, 1, deal=2)]) == [(2, 2), (6, 2)]
    assert ranges_of(8, [Cut(0, 2, 1, deal=2), Cut(0, 2, 1)]) == [(6, 2)]
    assert ranges_of(4, [Cut(0, 1, 0, deal=2)]) == [(0, 4)]


def test_uneven_pieces_are_refused_in_all_places_or_in_none():
    """One process that refuses while the others wait for it would hang them. Of 7 in two pieces, place 0 has 2 + 2."""
    for place in range(2):
        with pytest.raises(ValueError, match=r"of 7 of a parameter is cut into ranges .*; allowed: of one length"):
            shard_of((7, 5), [Cut(0, 2, place, deal=2)])
        assert shard_of((8, 5), [Cut(0, 2, place, deal=2)]) is not None
