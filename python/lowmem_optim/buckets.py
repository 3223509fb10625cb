"""What goes together into one call of a verb, and so into one launch."""

from __future__ import annotations

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

    def optional_state(self, key: str) -> list[Tensor | None]:
        """As `state`, with None for parameters that have none of that name."""
        return [state.get(key) for state in self.states]

    def options(self) -> dict[str, Any]:
        """The keyword arguments that all verbs share: transform, rounding, backend."""
        stochastic = rounds_stochastically(self.params[0].dtype, self.group["stochastic_rounding"])
        uids = [state["uid"] for state in self.states]
        return {
            "transform": self.transform,
            "rounding": Rounding(stochastic=stochastic, seed=self.group["seed"], uids=uids),
            "backend": self.group["backend"],
        }
