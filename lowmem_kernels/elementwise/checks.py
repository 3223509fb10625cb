"""What the lists of the elementwise verbs have to satisfy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..checks import check_gradients, check_list, check_params, state_dtypes
from ..numerics import PARAM_DTYPES, name_of
from ..shards import Shard
from ..tensors import remembered


def check_lists(
    params: Sequence[Tensor], grads: Sequence[Tensor], steps: Sequence[Tensor], **states: Sequence[Tensor]
) -> None:
    """Raise ValueError or TypeError, naming the argument, the value and what is allowed, when the lists do not fit."""
    if not params:
        return

    def check_state() -> None:
        check_params(params, steps)
        for name, tensors in states.items():
            check_list(name, tensors, [p.shape for p in params], params[0].device, state_dtypes(params))
        if len({tensors[0].dtype for tensors in states.values()}) > 1:
            found = ", ".join(f"{name} {name_of(tensors[0].dtype)}" for name, tensors in states.items())
            raise TypeError(f"states are {found}; allowed: one dtype for all of them")

    check_gradients(params, grads)
    remembered([params, steps, *states.values()], "check_lists", check_state)


def check_shards(params: Sequence[Tensor], shards: Sequence[Shard | None] | None) -> None:
    """Raise ValueError unless there is a shard, or None, for each parameter."""
    if shards is not None and len(shards) != len(params):
        raise ValueError(f"shards has {len(shards)} entries; allowed: {len(params)}, one for each parameter")


def check_grads(grads: Sequence[Tensor]) -> None:
    """Raise as `check_lists` when gradients by themselves do not fit together, or when there are none."""
    if not grads:
        raise ValueError("grads is empty; allowed: at least one tensor")
    check_list("grads", grads, [g.shape for g in grads], grads[0].device, PARAM_DTYPES, contiguous=False)
