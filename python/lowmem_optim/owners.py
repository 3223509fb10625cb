"""Rules that need whole matrices, of parameters in pieces: each is put together in one process and updated there.

The pieces of a parameter, of its gradient and of its state go to its owner in an all-to-all, the owner does what a
single process would do, to the bit, and what it has written goes back in another: two collectives for all parameters of
a bucket. Owners are chosen so that all have about as many elements, which is about what each has in pieces anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .buckets import Bucket
from .cuts import boxes_of
from .sharding import cut_dims, cuts_at, local_of, placements_of, process_group

#: Where tensors start in a buffer, in bytes, so that they can be read as numbers of any dtype.
ALIGNMENT = 16

#: The number of a parameter in a bucket, and "param", "grad" or a key of its state.
Name = tuple[int, str]


class _Piece(NamedTuple):
    """A box of a tensor: where it is in the whole, and in what a member of the group has of it.

    ``provides``: whether this member sends it to the owner; others may have the same.
    """

    name: Name
    member: int
    whole: tuple[slice, ...]
    local: tuple[slice, ...]
    provides: bool


def update_on_owners(bucket: Bucket, update: Callable[[Bucket], None]) -> None:
    """Update parameters in pieces by a function that takes whole ones.

    Every process of the parameters' mesh calls this with its pieces of the same parameters.
    """
    plan: _Plan = bucket.kept("owners", lambda _: _Plan(bucket))
    local = {(k, key): tensor for k, i in enumerate(plan.entries) for key, tensor in _tensors(bucket, i)}
    whole = {
        name: torch.empty(shape, dtype=local[name].dtype, device=bucket.device) for name, shape in plan.shapes.items()
    }
    to_owner = [(plan.owners[p.name[0]], local[p.name][p.local]) for p in plan.mine if p.provides]
    plan.exchange(to_owner, [(p.member, whole[p.name][p.whole]) for p in plan.owned if p.provides], bucket.device)
    if plan.owned:
        update(_of_wholes(bucket, plan, whole))
    from_owner = [(plan.owners[p.name[0]], local[p.name][p.local]) for p in plan.mine if p.name[1] != "grad"]
    written = [(p.member, whole[p.name][p.whole]) for p in plan.owned if p.name[1] != "grad"]
    plan.exchange(written, from_owner, bucket.device)


def _of_wholes(bucket: Bucket, plan: _Plan, whole: dict[Name, Tensor]) -> Bucket:
    """A bucket of what this process owns, for one update."""
    states: dict[int, dict[str, Any]] = {}
    for (k, key), tensor in whole.items():
        state = states.setdefault(k, {"uid": bucket.states[plan.entries[k]]["uid"]})
        if key not in ("param", "grad"):
            state[key] = tensor
    owned = [(k, part) for k, part in zip(plan.numbers, bucket.parts, strict=True) if k in states]
    made = Bucket(
        bucket.group, [whole[k, "param"] for k, _ in owned], [states[k] for k, _ in owned], [part for _, part in owned]
    )
    made.lasts = False
    made.transform = bucket.transform
    made.take([whole[k, "grad"] for k, _ in owned])
    made.notice()
    return made


class _Plan:
    """Who owns which parameter of a bucket, and which boxes that takes: the same plan in all processes of a group.

    Attributes:
        numbers: of each entry of the bucket, that of its parameter, which has one for each of its parts.
        entries: the first entry of each parameter.
        owners: of each parameter, as a place in the group.
        shapes: of the tensors that this process puts together.
        mine, owned: the boxes that this process has, and all boxes of what it owns, in an order that is everybody's.
    """

    def __init__(self, bucket: Bucket) -> None:
        first: Any = bucket.wholes[0]
        mesh, dims = first.device_mesh, cut_dims(first)
        self._group = process_group(mesh, dims)
        ranks = dist.get_process_group_ranks(self._group)
        me = ranks.index(dist.get_rank())
        places = [_place(mesh, rank) for rank in ranks]
        known: dict[int, int] = {}
        self.numbers = [known.setdefault(id(param), len(known)) for param in bucket.wholes]
        self.entries = [self.numbers.index(k) for k in range(len(known))]
        self.owners = _shared_out([bucket.wholes[i].numel() for i in self.entries], len(ranks))
        self.shapes: dict[Name, torch.Size] = {}
        self.mine: list[_Piece] = []
        self.owned: list[_Piece] = []
        for k, i in enumerate(self.entries):
            owner = self.owners[k]
            for key, shape, placements in _placed(bucket, i):
                if owner == me:
                    self.shapes[k, key] = shape
                cuts = [cuts_at(mesh, placements, place) for place in places]
                for member, here in enumerate(cuts):
                    # of several that have the same, the owner or the first
                    provides = member == (owner if cuts[owner] == here else cuts.index(here))
                    pieces = [_Piece((k, key), member, *box, provides) for box in boxes_of(shape, here)]
                    self.mine += pieces if member == me else []
                    self.owned += pieces if owner == me else []

    def exchange(self, send: list[tuple[int, Tensor]], receive: list[tuple[int, Tensor]], device: torch.device) -> None:
        """Send tensors to members of the group, and overwrite others with what comes from them, in the same order."""
        outgoing, incoming = (_Buffer(tensors, dist.get_world_size(self._group), device) for tensors in (send, receive))
        _copy(outgoing.tensors, outgoing.views)
        dist.all_to_all_single(incoming.memory, outgoing.memory, incoming.sizes, outgoing.sizes, group=self._group)
        _copy(incoming.views, incoming.tensors)


class _Buffer:
    """Memory for tensors that go to members of a group or come from them, and views of it like these tensors."""

    def __init__(self, tensors: list[tuple[int, Tensor]], members: int, device: torch.device) -> None:
        by_member = sorted(tensors, key=lambda each: each[0])
        self.tensors = [tensor for _, tensor in by_member]
        self.sizes = [0] * members
        starts = [0]
        for member, tensor in by_member:
            room = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            self.sizes[member] += room
            starts.append(starts[-1] + room)
        self.memory = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        self.views = [
            self.memory[start : start + t.nbytes].view(t.dtype).view(t.shape)
            for start, t in zip(starts, self.tensors, strict=False)
        ]


def _copy(tensors: list[Tensor], into: list[Tensor]) -> None:
    if tensors:
        torch._foreach_copy_(into, tensors)


def _tensors(bucket: Bucket, i: int) -> Iterator[tuple[str, Tensor]]:
    """What this process has of an entry of a bucket."""
    yield "param", bucket.params[i]
    yield "grad", bucket.grads[i]
    yield from ((key, local_of(value)) for key, value in bucket.states[i].items() if isinstance(value, Tensor))


def _placed(bucket: Bucket, i: int) -> Iterator[tuple[str, torch.Size, Sequence[Any]]]:
    """The same tensors' whole shapes and placements; those of numbers are none."""
    param: Any = bucket.wholes[i]
    yield "param", param.shape, param.placements
    yield "grad", param.shape, param.placements
    for key, value in bucket.states[i].items():
        if isinstance(value, Tensor):
            yield key, value.shape, placements_of(value)


def _place(mesh: Any, rank: int) -> list[int]:
    """Where a process is in a mesh."""
    (place,) = (mesh.mesh == rank).nonzero().tolist()
    found: list[int] = place
    return found


def _shared_out(sizes: Sequence[int], members: int) -> list[int]:
    """Who owns what: the largest first, each to the one that has least."""
    loads, owners = [0] * members, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[i] = min(range(members), key=loads.__getitem__)
        loads[owners[i]] += sizes[i]
    return owners
