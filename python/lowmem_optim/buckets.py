"""What goes together into one call of a verb, and so into one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.numerics import rounds_stochastically
from lowmem_kernels.pieces import RowPieces
from lowmem_kernels.shards import Shard
from lowmem_kernels.tensors import Gradients, Tensors

from .cuts import shard_of
from .sharding import any_sharded, cut_dims, cuts_of, is_sharded, local_of, locals_of, placing, row_pieces

T = TypeVar("T")

#: the rule that an optimizer is named after
OWN_RULE = "own"


class Part(NamedTuple):
    """What of a parameter is updated by itself: by which rule, and with which of its state.

    Attributes:
        rule: as of `LowMemOptimizer.rule_of`.
        number: of the part; the keys of its state end in ".1", ".2", ... and those of part 0 in nothing.
        where: (dimension, start, length), or None for all of the parameter.
    """

    rule: str = OWN_RULE
    number: int = 0
    where: tuple[int, int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor of the parameter's shape, as a view."""
        return tensor if self.where is None else tensor.narrow(*self.where)

    def key(self, name: str) -> str:
        """Return the key of this part's state."""
        return f"{name}.{self.number}" if self.number else name


class Member(NamedTuple):
    """A parameter, its group and its place there; the identity is its name, or without names its position among all."""

    group: dict[str, Any]
    place: int
    param: Tensor
    identity: str | int


class Bucket:
    """Parts of parameters of one group that share rule, device and dtypes, with their states and, in a step, gradients.

    Nearly always a part is the whole parameter. Made once and kept from step to step, so that verbs find the same
    `Tensors`. Of parameters that are DTensors, and of their states and gradients, it has what is in this process; they
    then have the same mesh and placements.
    """

    def __init__(
        self, group: dict[str, Any], params: Sequence[Tensor], states: Iterable[dict[str, Any]], parts: Iterable[Part]
    ) -> None:
        self.group = group
        self.parts = list(parts)
        self.rule = self.parts[0].rule
        #: the parameters themselves if they are DTensors
        self.wholes = [param for param in params if is_sharded(param)]
        #: whether no process has all of a parameter: those that belong together have the same placements
        self.in_pieces = bool(self.wholes and cut_dims(self.wholes[0]))
        here = locals_of(params)
        # what lies here of a part is no range of what lies here of the parameter
        narrowed = [] if self.in_pieces else [(i, p.where) for i, p in enumerate(self.parts) if p.where is not None]
        self._narrowed = [i for i, _ in narrowed]
        self._wheres = [*zip(*(where for _, where in narrowed), strict=True)]
        views = [here[i] if self.in_pieces else part.of(here[i]) for i, part in enumerate(self.parts)]
        self.params = Tensors(views)
        #: which elements of the wholes are here, None where they are all or the first
        self.shards: list[Shard | None] | None = None
        if self.wholes:
            self.shards = [shard_of(param.shape, cuts_of(param)) for param in self.wholes]
        self.states = list(states)
        self.grads = Gradients()
        self.transform = GradTransform()
        #: whether it is kept for the next step
        self.lasts = True
        # uids of parameters have 56 bits
        self.uids = tuple([s["uid"] + (part.number << 56) for s, part in zip(self.states, self.parts, strict=True)])
        self._values: list[Any] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._lists: dict[str, Tensors] = {}
        self._kept: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """The device of all tensors in the bucket."""
        return self.params[0].device

    def take(self, grads: list[Tensor]) -> None:
        """Take the gradients of the parameters, or what of them is here, of which a part of one is a view."""
        if self._narrowed:
            views = map(torch.narrow, [grads[i] for i in self._narrowed], *self._wheres)
            for i, view in zip(self._narrowed, views, strict=True):
                grads[i] = view
        self.grads = Gradients(grads)

    def notice(self) -> None:
        """Forget the lists of state if any of it is new or has other memory: anyone may write to it, or to `.data`."""
        values = [*chain.from_iterable(map(dict.values, self.states))]
        # in C, since this is done in every step for every tensor
        same = len(values) == len(self._values) and all(map(is_, values, self._values))
        if not same or [*map(Tensor.data_ptr, locals_of(self._tensors))] != self._addresses:
            self._values = values
            self._tensors = [value for value in values if isinstance(value, Tensor)]
            self._addresses = [*map(Tensor.data_ptr, locals_of(self._tensors))]
            self._lists = {}

    def state(self, key: str, otherwise: str = "") -> Tensors:
        """Of each state the tensor of this name, or where it has none of the other name, or None."""
        if key not in self._lists:
            self._lists[key] = Tensors(
                [
                    local_of(state.get(part.key(key), state.get(part.key(otherwise))))
                    for state, part in zip(self.states, self.parts, strict=True)
                ]
            )
        return self._lists[key]

    def pieces(self) -> RowPieces | None:
        """How the rows of matrices in pieces are spread over processes; None where they are whole, or cut otherwise."""
        return self.kept("pieces", lambda _: row_pieces(self.wholes)) if self.in_pieces else None

    def kept(self, what: str, make: Callable[[Tensors], T]) -> T:
        """Return what ``make`` makes of the parameters, once for as long as the bucket lives."""
        if what not in self._kept:
            self._kept[what] = make(self.params)
        kept: T = self._kept[what]
        return kept

    def options(self) -> dict[str, Any]:
        """The keyword arguments that all verbs share: transform, rounding, backend."""
        stochastic = rounds_stochastically(self.params[0].dtype, self.group["stochastic_rounding"])
        return {
            "transform": self.transform,
            "rounding": Rounding(stochastic=stochastic, seed=self.group["seed"], uids=self.uids),
            "backend": self.group["backend"],
        }


class Known(NamedTuple):
    """The buckets that parameters with a gradient were sorted into, and what they depend on."""

    objects: list[object]
    facts: tuple[list[Any], ...]
    buckets: list[Bucket]
    places: list[list[int]]


def facts_of(
    groups: list[dict[str, Any]], params: list[Tensor], grads: list[Tensor | None]
) -> tuple[tuple[list[Any], ...], Sequence[Tensor | None]]:
    """Return what buckets depend on besides objects, and the gradients, of DTensors what of them is here."""
    local_grads = locals_of(grads)
    facts: tuple[list[Any], ...] = (
        [len(group["params"]) for group in groups],
        [*map(Tensor.data_ptr, locals_of(params))],
        [param.dtype for param in params],
        [None if grad is None else grad.dtype for grad in grads],
        [None if grad is None else grad.layout for grad in grads],
    )
    if any_sharded(params) or any_sharded(grads):
        facts += ([*map(placing, params)], [*map(placing, grads)])
    return facts, local_grads


def same_objects(some: list[object], others: list[object]) -> bool:
    """Say whether two lists have the same objects."""
    return len(some) == len(others) and all(map(is_, some, others))


def narrow_parts(state: Mapping[str, Any]) -> list[tuple[str, torch.dtype]]:
    """Return what of a state is not float32. Other parts may be there or not: a vector goes along with matrices."""
    return [(k, v.dtype) for k, v in state.items() if type(v) is not int and v.dtype is not torch.float32]
