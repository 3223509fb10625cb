"""Sharded parameters (DTensor): what of a whole tensor is here, said without any communication.

A DTensor lies on a mesh of processes. For each dimension of the mesh it is cut along one of its own dimensions
(``Shard``, ``_StridedShard``) or copied (``Replicate``). Whatever the placements, a process then has of each dimension
some ranges of indices, and `Shard` says which elements of the whole those are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import accumulate, pairwise, product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_kernels.shards import Shard
from lowmem_kernels.table import collapse

#: (start, length) of indices along a dimension
Range = tuple[int, int]


class Cut(NamedTuple):
    """One cut of a dimension, in the order in which cuts are made.

    Attributes:
        dim: of the tensor.
        parts: of as many indices as there are, over their number, rounded up; the last may have fewer, or none.
        place: of the part that is here.
        deal: first cut into so many pieces; a part is then the same part of each of them.
    """

    dim: int
    parts: int
    place: int
    deal: int = 1


def ranges_of(size: int, cuts: Iterable[Cut]) -> list[Range]:
    """Return which indices of a dimension are left of 0 .. size - 1 after the cuts, which are all of that dimension."""
    ranges = [(0, size)]
    for cut in cuts:
        pieces = [_part(ranges, cut.deal, i) for i in range(cut.deal)]
        ranges = _merged([one for piece in pieces for one in _part(piece, cut.parts, cut.place)])
    return ranges


def local_shape(shape: Sequence[int], cuts: Sequence[Cut]) -> tuple[int, ...]:
    """Return the shape of what is left of a tensor after the cuts."""
    return tuple([_length(ranges_of(size, [c for c in cuts if c.dim == dim])) for dim, size in enumerate(shape)])


def shard_of(shape: Sequence[int], cuts: Sequence[Cut]) -> Shard | None:
    """Return which elements of a tensor are left after the cuts; None: all of them, or some of the first in order.

    Raises ValueError where ranges of a dimension are of several lengths or distances, here or in another place, which
    no placement of FSDP, of tensor parallel or of both together has.
    """
    for dim, size in enumerate(shape):
        _check_even(size, tuple([(c.parts, c.deal) for c in cuts if c.dim == dim]))
    if 0 in local_shape(shape, cuts):
        return None
    sizes: list[int] = []
    strides: list[int] = []
    first = 0
    for dim, size in enumerate(shape):
        stride = prod(shape[dim + 1 :])
        ranges = ranges_of(size, [c for c in cuts if c.dim == dim])
        first += ranges[0][0] * stride
        sizes += [len(ranges), ranges[0][1]]
        strides += [stride * (ranges[-1][0] - ranges[-2][0]) if len(ranges) > 1 else 0, stride]
    shard = Shard(first, tuple([(size, stride) for size, stride in collapse(sizes, strides)]))
    return None if shard.is_range and first == 0 else shard


def cut_out(whole: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """Return what is left of a tensor after the cuts."""
    for dim, size in enumerate(whole.shape):
        ranges = ranges_of(size, [c for c in cuts if c.dim == dim])
        if ranges != [(0, size)]:
            parts = [whole.narrow(dim, start, length) for start, length in ranges]
            whole = torch.cat(parts, dim) if parts else whole.narrow(dim, 0, 0)
    return whole


def boxes_of(shape: Sequence[int], cuts: Sequence[Cut]) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Return the boxes that are left of a tensor after the cuts: where each is in the whole, and in what is left."""
    by_dim = []
    for dim, size in enumerate(shape):
        ranges = ranges_of(size, [c for c in cuts if c.dim == dim])
        ends = [*accumulate(length for _, length in ranges)]
        here = [slice(end - length, end) for end, (_, length) in zip(ends, ranges, strict=True)]
        by_dim.append([*zip([slice(start, start + length) for start, length in ranges], here, strict=True)])
    return [(tuple([a for a, _ in box]), tuple([b for _, b in box])) for box in product(*by_dim)]


# DTensors. They are recognized by what they have: importing them takes a second, and who has some has imported them


def is_sharded(tensor: object) -> bool:
    """Say whether something is a DTensor."""
    return hasattr(type(tensor), "placements")


def any_sharded(tensors: Iterable[object]) -> bool:
    """Say whether some are DTensors, without any work for each of them in Python."""
    return any([hasattr(kind, "placements") for kind in set(map(type, tensors))])


def local_of(tensor: Any) -> Any:
    """Return what this process has of a DTensor, as the tensor that it is in, and anything else as it is."""
    if not hasattr(type(tensor), "placements"):
        return tensor
    if torch.is_grad_enabled():
        with torch.no_grad():
            return local_of(tensor)
    # no view is made without gradients
    local = tensor.to_local()
    return local.wait() if hasattr(local, "wait") else local


def locals_of(tensors: Sequence[Any]) -> Sequence[Any]:
    """Return `local_of` each: the same sequence where none of them is a DTensor."""
    return [*map(local_of, tensors)] if any_sharded(tensors) else tensors


def placing(tensor: Any) -> tuple[Any, ...] | None:
    """Return (mesh, placements) of a DTensor, None for others: tensors that have the same can be updated together."""
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def placements_of(tensor: Any) -> tuple[Any, ...]:
    """Return the placements of a DTensor, none of another tensor."""
    return tuple(tensor.placements) if is_sharded(tensor) else ()


def cuts_at(mesh: Any, placements: Sequence[Any], coordinate: Sequence[int]) -> list[Cut]:
    """Return the cuts that leave of a whole tensor what the process at a place of the mesh has of it."""
    return [
        Cut(placement.dim, mesh.size(i), coordinate[i], getattr(placement, "split_factor", 1))
        for i, placement in enumerate(placements)
        if not placement.is_replicate()
    ]


def cuts_of(tensor: Any) -> list[Cut]:
    """Return the cuts that leave of a whole tensor what this process has of a DTensor."""
    return cuts_at(tensor.device_mesh, tensor.placements, tensor.device_mesh.get_coordinate())


def cut_dims(tensor: Any) -> tuple[int, ...]:
    """Return the dimensions of its mesh along which a DTensor is in pieces: not those that have copies of it."""
    mesh, placements = tensor.device_mesh, tensor.placements
    return tuple([i for i, p in enumerate(placements) if not p.is_replicate() and mesh.size(i) > 1])


def process_group(mesh: Any, dims: tuple[int, ...]) -> Any:
    """Return the group of this process and those that differ from it in these dimensions of a mesh; None: itself."""
    if not dims:
        return None
    ranks = mesh.mesh
    for i, place in reversed([*enumerate(mesh.get_coordinate())]):
        if i not in dims:
            ranks = ranks.select(i, place)
    if ranks.numel() == dist.get_world_size():
        return dist.group.WORLD
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    return _group_of(tuple(sorted(ranks.flatten().tolist())))


def moved_placements(param: Any, dims: Sequence[int | None]) -> tuple[Any, ...]:
    """Return the placements of a tensor whose dimensions go along with these of a DTensor; None: with none of them."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    moved: list[Any] = []
    for placement in param.placements:
        if placement.is_replicate() or placement.dim not in dims:
            moved.append(Replicate())
            continue
        dim = dims.index(placement.dim)
        deal = getattr(placement, "split_factor", None)
        moved.append(Shard(dim) if deal is None else _StridedShard(dim, split_factor=deal))
    return tuple(moved)


def is_first_copy(tensor: Any) -> bool:
    """Say whether this process is the first of those that have the same elements of a DTensor, along the mesh."""
    coordinate = tensor.device_mesh.get_coordinate()
    return all(place == 0 for place, p in zip(coordinate, tensor.placements, strict=True) if p.is_replicate())


def dtensor_of(local: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """Return a DTensor of what this process has of it, which is contiguous."""
    from torch.distributed.tensor import DTensor

    strides = [*accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1)][::-1][: len(shape)]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides))


def process_groups(mesh: Any) -> tuple[Any, ...]:
    """Return the groups over each of which a sum has to be taken to have it over a mesh: one where that is all."""
    if mesh.size() == dist.get_world_size():
        return (dist.group.WORLD,) if mesh.size() > 1 else ()
    return tuple([mesh.get_group(i) for i in range(mesh.ndim) if mesh.size(i) > 1])


def check_sharding(param: Any) -> None:
    """Raise TypeError or ValueError for a DTensor that no optimizer can update, and do nothing for other tensors."""
    if not is_sharded(param):
        return
    if param.device_mesh.get_coordinate() is None:
        raise ValueError("a parameter is on a mesh that this process is no part of; allowed: meshes that it is part of")
    for placement in param.placements:
        if not placement.is_replicate() and not (placement.is_shard() or hasattr(placement, "split_factor")):
            raise TypeError(f"a parameter is a DTensor with {placement!r}; allowed: Shard, _StridedShard, Replicate")
    cuts = cuts_of(param)
    shard_of(param.shape, cuts)
    expected, found = local_shape(param.shape, cuts), tuple(local_of(param).shape)
    if expected != found:
        raise ValueError(f"a parameter's shard has shape {found}; allowed: {expected}, by its {param.placements}")


def check_placements(param: Any, grad: Any, identity: str | int) -> None:
    """Raise TypeError unless a gradient is placed as its parameter is."""
    if placing(param) != placing(grad):
        found, allowed = (f"a DTensor with {t.placements}" if is_sharded(t) else "no DTensor" for t in (grad, param))
        raise TypeError(
            f"the gradient of {identity!r} is {found}; allowed: {allowed}, as its parameter, on the same mesh "
            "(grad.redistribute(placements=param.placements) does it, by a collective for each gradient)"
        )


def placed(value: Any, param: Any, placements: Sequence[Any], name: str) -> Tensor:
    """Return what this process has of a saved state, which is whole or a DTensor of its parameter's mesh.

    ``placements`` are those that it is to have if the parameter is a DTensor. Raises ValueError for a DTensor on
    another mesh, or where the parameter is none.
    """
    if not is_sharded(value):
        whole: Tensor = value
        if not is_sharded(param):
            return whole
        return cut_out(whole, cuts_at(param.device_mesh, placements, param.device_mesh.get_coordinate()))
    if not is_sharded(param) or value.device_mesh != param.device_mesh:
        raise ValueError(
            f"{name} is a DTensor on {value.device_mesh}; allowed: whole tensors, or DTensors on the parameter's mesh; "
            "torch.distributed.checkpoint loads from any mesh to any other"
        )
    if tuple(value.placements) != tuple(placements):
        value = value.redistribute(placements=placements)
    local: Tensor = local_of(value)
    return local


@cache
def _group_of(ranks: tuple[int, ...]) -> Any:
    """A new group, which only its members make."""
    return dist.new_group(list(ranks), use_local_synchronization=True)


@lru_cache(maxsize=4096)
def _check_even(size: int, cuts: tuple[tuple[int, int], ...]) -> None:
    """Raise as `shard_of`, in all places or in none: processes that disagree would wait for each other."""
    if all(deal == 1 for _, deal in cuts):
        return
    for places in product(*(range(parts) for parts, _ in cuts)):
        here = [Cut(0, parts, place, deal) for (parts, deal), place in zip(cuts, places, strict=True)]
        ranges = ranges_of(size, here)
        distances = {b - a for (a, _), (b, _) in pairwise(ranges)}
        if len(distances) > 1 or len({length for _, length in ranges}) > 1:
            raise ValueError(
                f"a dimension of {size} of a parameter is cut into ranges (start, length) {ranges}; allowed: of one "
                "length and distance, as FSDP and tensor parallel make them"
            )


def _part(ranges: list[Range], parts: int, place: int) -> list[Range]:
    """Cut a sequence of indices, given as ranges, into parts and return one of them."""
    size = -(-_length(ranges) // parts)
    begin, end, taken = place * size, (place + 1) * size, []
    for start, length in ranges:
        low, high = max(begin, 0), min(end, length)
        if low < high:
            taken.append((start + low, high - low))
        begin, end = begin - length, end - length
    return taken


def _merged(ranges: list[Range]) -> list[Range]:
    """Ranges in order, with those that follow each other as one."""
    merged: list[Range] = []
    for start, length in ranges:
        if merged and sum(merged[-1]) == start:
            start, length = merged[-1][0], merged.pop()[1] + length
        merged.append((start, length))
    return merged


def _length(ranges: list[Range]) -> int:
    return sum(length for _, length in ranges)
