"""Rules that need whole matrices, of parameters in pieces: each is put together in one process and updated there.

The pieces of a parameter, of its gradient and of its state go to its owner in an all-to-all, the owner does what a
single process would do, to the bit, and what it has written goes back in another. That goes in rounds, each of as many
parameters of a bucket as ROUND_BYTES allows, which are shared out so that all owners have about as many elements.
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

#: Bytes of a round for each process, unless one parameter has more. There are three times as many at its height: what
#: is sent, what comes, and what is put together from it.
ROUND_BYTES = 256 << 20

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
    rounds: list[_Round] = bucket.kept("owners", lambda _: _rounds(bucket))
    for each in rounds:
        _update(bucket, each, update)


def _update(bucket: Bucket, plan: _Round, update: Callable[[Bucket], None]) -> None:
    local = {(k, key): tensor for k, i in plan.entries.items() for key, tensor in _tensors(bucket, i)}
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


def _of_wholes(bucket: Bucket, plan: _Round, whole: dict[Name, Tensor]) -> Bucket:
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


def _rounds(bucket: Bucket) -> list[_Round]:
    """Cut a bucket's parameters into rounds, in their order. A parameter has an entry for each of its parts."""
    known: dict[int, int] = {}
    numbers = [known.setdefault(id(param), len(known)) for param in bucket.wholes]
    entries = [numbers.index(k) for k in range(len(known))]
    mesh, dims = _mesh_of(bucket)
    limit = ROUND_BYTES * dist.get_world_size(process_group(mesh, dims))
    sizes = [sum(t.shape.numel() * t.element_size() for t in _wholes(bucket, i).values()) for i in entries]
    rounds: list[dict[int, int]] = [{}]
    room = limit
    for k, (i, size) in enumerate(zip(entries, sizes, strict=True)):
        if size > room and rounds[-1]:
            rounds.append({})
            room = limit
        rounds[-1][k] = i
        room -= size
    return [_Round(bucket, numbers, each) for each in rounds]


class _Round:
    """Who owns which of some parameters of a bucket, and which boxes that takes: the same in all processes of a group.

    Attributes:
        numbers: of each entry of the bucket, that of its parameter.
        entries: the first entry of each parameter of this round.
        owners: of these, as places in the group.
        shapes: of the tensors that this process puts together.
        mine, owned: the boxes that this process has, and all boxes of what it owns, in an order that is everybody's.
    """

    def __init__(self, bucket: Bucket, numbers: list[int], entries: dict[int, int]) -> None:
        self.numbers, self.entries = numbers, entries
        self._mesh, self._dims = _mesh_of(bucket)
        self._group = process_group(self._mesh, self._dims)
        ranks = dist.get_process_group_ranks(self._group)
        me = ranks.index(dist.get_rank())
        self._places = [_place(self._mesh, rank) for rank in ranks]
        owners = _shared_out([bucket.wholes[i].numel() for i in entries.values()], len(ranks))
        self.owners = dict(zip(entries, owners, strict=True))
        self.shapes: dict[Name, torch.Size] = {}
        self.mine: list[_Piece] = []
        self.owned: list[_Piece] = []
        for k, i in entries.items():
            owner = self.owners[k]
            for key, tensor in _wholes(bucket, i).items():
                self.mine += self._pieces((k, key), tensor, me, owner)
                if owner == me:
                    self.shapes[k, key] = tensor.shape
                    for member in range(len(ranks)):
                        self.owned += self._pieces((k, key), tensor, member, owner)

    def _pieces(self, name: Name, tensor: Tensor, member: int, owner: int) -> list[_Piece]:
        placements = placements_of(tensor)
        here, there = (cuts_at(self._mesh, placements, self._places[i]) for i in (member, owner))
        copied = [i for i in self._dims if not placements or placements[i].is_replicate()]
        # of several that have the same, the owner or the first
        provides = member == owner if here == there else not any(self._places[member][i] for i in copied)
        return [_Piece(name, member, *box, provides) for box in boxes_of(tensor.shape, here)]

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


def _mesh_of(bucket: Bucket) -> tuple[Any, tuple[int, ...]]:
    """The mesh of a bucket's parameters, and the dimensions of it along which they are in pieces."""
    first: Any = bucket.wholes[0]
    return first.device_mesh, cut_dims(first)


def _wholes(bucket: Bucket, i: int) -> dict[str, Tensor]:
    """Parameter and state of an entry of a bucket as they are, and for the gradient the parameter."""
    states = {key: value for key, value in bucket.states[i].items() if isinstance(value, Tensor)}
    return {"param": bucket.wholes[i], "grad": bucket.wholes[i], **states}


def _tensors(bucket: Bucket, i: int) -> Iterator[tuple[str, Tensor]]:
    """What this process has of them."""
    for key, tensor in _wholes(bucket, i).items():
        yield key, bucket.grads[i] if key == "grad" else local_of(tensor)


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
