"""What the lists of the whitening verbs have to satisfy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..checks import check_gradients, check_list, check_params
from ..numerics import PARAM_DTYPES
from ..tensors import remembered


def check_whiten(params: Sequence[Tensor], grads: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    """Raise ValueError or TypeError, naming the argument, the value and what is allowed, when the lists do not fit."""
    if not params:
        return

    def check_state() -> None:
        check_params(params, steps)
        _check_matrices("params", params)

    check_gradients(params, grads)
    remembered([params, steps], "check_whiten", check_state)


def check_grads(grads: Sequence[Tensor]) -> None:
    """Raise as `check_whiten` when gradients by themselves do not fit together."""
    if grads:
        check_list("grads", grads, [g.shape for g in grads], grads[0].device, PARAM_DTYPES, contiguous=False)
        _check_matrices("grads", grads)


def _check_matrices(name: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.ndim < 2:
            raise ValueError(f"{name}[{i}] has shape {tuple(tensor.shape)}; allowed: two or more dimensions")
