"""What goes together into one call of a verb, and so into one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.numerics import rounds_stochastically
from lowmem_kernels.tensors import Gradients, Tensors

T = TypeVar("T")

#: the rule that an optimizer is named after
OWN_RULE = "own"


class Bucket:
    """Parameters of one group that share rule, device and dtypes, each with its state, and its gradient during a step.

    Made once and kept from step to step, so that verbs find the same `Tensors`.
    """

    def __init__(
        self, group: dict[str, Any], rule: str, params: Iterable[Tensor], states: Iterable[dict[str, Any]]
    ) -> None:
        self.group = group
        self.rule = rule
        self.params = Tensors(params)
        self.states = list(states)
        self.grads = Gradients()
        self.transform = GradTransform()
        self.uids = tuple([state["uid"] for state in self.states])
        self._values: list[Any] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._lists: dict[str, Tensors] = {}
        self._kept: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """The device of all tensors in the bucket."""
        return self.params[0].device

    def notice(self) -> None:
        """Forget the lists of state if any of it is new or has other memory: anyone may write to it, or to `.data`."""
        values = [*chain.from_iterable(map(dict.values, self.states))]
        # in C, since this is done in every step for every tensor
        same = len(values) == len(self._values) and all(map(is_, values, self._values))
        if not same or [*map(Tensor.data_ptr, self._tensors)] != self._addresses:
            self._values = values
            self._tensors = [value for value in values if isinstance(value, Tensor)]
            self._addresses = [*map(Tensor.data_ptr, self._tensors)]
            self._lists = {}

    def state(self, key: str, otherwise: str = "") -> Tensors:
        """Of each state the tensor of this name, or where it has none of the other name, or None."""
        if key not in self._lists:
            self._lists[key] = Tensors([state.get(key, state.get(otherwise)) for state in self.states])
        return self._lists[key]

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
