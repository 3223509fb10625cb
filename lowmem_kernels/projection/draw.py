"""Random projections in torch: the specification of what kernels draw, and what references multiply with.

Entry (i, k) of the projection of an epoch is made of word k % 4 of

    philox4x32(key, k // 4, i, epoch, tag)

where k is the index along the contracted dimension of the whole parameter. A parameter's own projection has the tag 0
and a key of the run's seed and its uid; one that parameters share has the tag 1 and a key of the seed, the number of
contracted elements and the rank.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..philox import philox4x32
from ..pieces import RowPlace
from ..rounding import tensor_key
from .normal import normals
from .rule import Draw, Sides

OWN, SHARED = 0, 1

#: The least rank at which parameters share a projection.
SHARED_RANK = 2


def draw_key(seed: int, number: int) -> int:
    """Return the 64-bit Philox key, as a signed integer, of a seed and a parameter's uid or a shared projection."""
    high, low = tensor_key(~seed, number), tensor_key(seed, number)
    return (high - (high >> 31 << 32) << 32) + low


def is_shared(sides: Sides, source: str) -> bool:
    """Say whether parameters share their projection."""
    return sides.rank >= SHARED_RANK and source != "torch"


def key_of(sides: Sides, draw: Draw, uid: int) -> tuple[int, int]:
    """Return the key and the tag of a parameter's projection."""
    if is_shared(sides, draw.source):
        return draw_key(draw.seed, sides.contracted << 24 | sides.rank), SHARED
    return draw_key(draw.seed, uid), OWN


def projection_of(sides: Sides, draw: Draw, uid: int, device: torch.device) -> Tensor:
    """Return P, unscaled and not to be written to, fp32 [rank, contracted]; the identity where nothing is projected."""
    if not sides.projected:
        return torch.eye(sides.contracted, device=device)
    epoch = int(draw.epoch)
    if draw.source == "torch":
        return torch_projection(sides, draw.seed + uid + 1, epoch, device)
    key, tag = key_of(sides, draw, uid)
    return _entries(key, tag, sides.rank, sides.contracted, epoch, draw.source, device)


def places_of(projection: Tensor, place: RowPlace, count: int) -> Tensor:
    """Return the columns of P that belong to the rows that are here, so many."""
    index = torch.arange(count, device=projection.device)
    return projection[:, place.first + index // place.run * place.distance + index % place.run]


@lru_cache(maxsize=32)
def _entries(key: int, tag: int, rank: int, contracted: int, epoch: int, source: str, device: torch.device) -> Tensor:
    quads = torch.arange(-(-contracted // 4), device=device)
    words = philox4x32(key, quads, torch.arange(rank, device=device)[:, None], epoch, tag)
    if source == "rademacher":
        numbers = [1.0 - 2.0 * (word >> 31) for word in words]
    else:
        numbers = [*normals(*words[:2]), *normals(*words[2:])]
    entries = torch.stack(numbers, dim=2).reshape(rank, -1)[:, :contracted]
    return entries.bfloat16().float()


@lru_cache(maxsize=512)
def torch_projection(sides: Sides, seed: int, epoch: int, device: torch.device) -> Tensor:
    """Return P of the source "torch", unscaled, fp32 [rank, contracted]."""
    generator = torch.Generator(device).manual_seed(_chained(seed, epoch - 1))
    shape = (sides.rank, sides.contracted) if sides.right else (sides.contracted, sides.rank)
    drawn = torch.randn(shape, generator=generator, device=device)
    return drawn if sides.right else drawn.mT.contiguous()


def _chained(seed: int, links: int) -> int:
    """The seed that many redraws later: each is the last of 15 numbers that the one before draws."""
    for _ in range(links):
        generator = torch.Generator().manual_seed(seed)
        seed = int(torch.randint(0, 2**63 - 1, (15,), generator=generator)[-1])
    return seed
