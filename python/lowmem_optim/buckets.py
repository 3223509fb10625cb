"""What goes together into one call of a verb, and so into one launch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.numerics import rounds_stochastically


@dataclass
class Bucket:
    """Parameters of one group that share device and dtypes, each with its gradient and state."""

    group: dict[str, Any]
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    transform: GradTransform = field(default_factory=GradTransform)

    @property
    def device(self) -> torch.device:
        """The device of all tensors in the bucket."""
        return self.params[0].device

    def state(self, key: str) -> list[Tensor]:
        """The state tensors of one name."""
        return [state[key] for state in self.states]

    def options(self) -> dict[str, Any]:
        """The keyword arguments that all verbs share: transform, rounding, backend."""
        stochastic = rounds_stochastically(self.params[0].dtype, self.group["stochastic_rounding"])
        uids = [state["uid"] for state in self.states]
        return {
            "transform": self.transform,
            "rounding": Rounding(stochastic=stochastic, seed=self.group["seed"], uids=uids),
            "backend": self.group["backend"],
        }


def make_buckets(entries: Iterable[tuple[dict[str, Any], Tensor, Tensor, dict[str, Any]]]) -> list[Bucket]:
    """Sort (group, parameter, gradient, state) into buckets, in order of first appearance."""
    buckets: dict[tuple[Any, ...], Bucket] = {}
    for group, param, grad, state in entries:
        state_dtypes = tuple(value.dtype for value in state.values() if isinstance(value, Tensor))
        key = (id(group), param.device, param.dtype, grad.dtype, state_dtypes)
        bucket = buckets.get(key)
        if bucket is None:
            bucket = buckets[key] = Bucket(group)
        bucket.params.append(param)
        bucket.grads.append(grad)
        bucket.states.append(state)
    return list(buckets.values())
