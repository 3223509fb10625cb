"""State of parameters that are DTensors: which piece of each state lies with which piece of its parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .cuts import cut_out, local_shape
from .sharding import cuts_at, dtensor_of, moved_placements

#: With which dimension of its parameter each dimension of a state goes; None: with none, and all processes have all.
Dims = Sequence[int | None]


def dims_by_name(key: str, ndim: int) -> Dims:
    """Return the `Dims` of a state by its name, of a parameter of so many dimensions.

    ``..._row`` has all of the parameter's dimensions but the last, ``..._col`` all but the last but one, and others
    have its shape.
    """
    name = key.partition(".")[0]
    if name.endswith("_row"):
        return range(ndim - 1)
    if name.endswith("_col"):
        return (*range(ndim - 2), ndim - 1)
    return range(ndim)


def stand_in(param: Tensor) -> Tensor:
    """Return a tensor of a parameter's shape and dtype on the meta device: whole, where the parameter is a DTensor."""
    return torch.empty(param.shape, dtype=param.dtype, device="meta")


def new_pieces(
    expected: Mapping[str, Tensor],
    param: Any,
    dims_of: Callable[[str], Dims],
    start_of: Callable[[str, torch.Size], Tensor | None],
) -> dict[str, Tensor]:
    """Return the state of a DTensor before its first update: DTensors, and plain tensors for numbers.

    Args:
        expected: the state of the whole parameter, on the meta device.
        param: the DTensor.
        dims_of: says how a state goes along with it.
        start_of: (key, shape of the whole state) -> what the state starts with; None: zeros.
    """
    mesh, state = param.device_mesh, {}
    for key, whole in expected.items():
        if whole.ndim == 0:
            state[key] = torch.zeros((), dtype=whole.dtype, device=param.device)
            continue
        placements = moved_placements(param, dims_of(key))
        cuts = cuts_at(mesh, placements, mesh.get_coordinate())
        start = start_of(key, whole.shape)
        if start is None:
            local = torch.zeros(local_shape(whole.shape, cuts), dtype=whole.dtype, device=param.device)
        else:
            local = cut_out(start, cuts).to(param.device, whole.dtype, copy=True).contiguous()
        state[key] = dtensor_of(local, mesh, placements, whole.shape)
    return state
