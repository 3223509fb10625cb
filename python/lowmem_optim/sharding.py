"""Sharded parameters (DTensor): what of a whole tensor is here, and the groups of processes that have the rest.

A DTensor lies on a mesh of processes. For each dimension of the mesh it is cut along one of its own dimensions
(``Shard``, ``_StridedShard``) or copied (``Replicate``). DTensors are recognized by what they have: importing them
takes a second, and who has some has imported them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_kernels.pieces import RowPieces

from .cuts import Cut, cut_out, local_shape, row_place, shard_of


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


def process_group(mesh: Any, dims: Iterable[int] | None = None) -> Any:
    """Return the group of this process and those that differ from it in some dimensions of a mesh (None: in any).

    None where it is alone.
    """
    dims = [i for i in (range(mesh.ndim) if dims is None else dims) if mesh.size(i) > 1]
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


def row_pieces(params: Sequence[Any]) -> RowPieces | None:
    """Return how the rows of DTensors are spread over processes; None where anything else but rows is cut.

    They have the same mesh, placements and number of dimensions.
    """
    first = params[0]
    dims = cut_dims(first)
    if first.ndim < 2 or any(first.placements[i].dim != first.ndim - 2 for i in dims):
        return None
    rows = [param.shape[-2] for param in params]
    places = [row_place(n, cuts_of(param)) for n, param in zip(rows, params, strict=True)]
    total = partial(dist.all_reduce, group=process_group(first.device_mesh, dims))
    return RowPieces(tuple(rows), tuple(places), total)


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
