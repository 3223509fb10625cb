"""Turning saved state, ours or that of torch.optim and its kin, into state of a parameter here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowmem_kernels.numerics import name_of

from .pieces import Dims
from .sharding import dtensor_of, is_sharded, local_of, moved_placements, placed


def uid_of(identity: str | int) -> int:
    """Return what tells a parameter's rounding noise from another's: a position itself, or 56 bits of a name's hash."""
    if isinstance(identity, int):
        return identity
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=7).digest(), "little")


@dataclass(frozen=True)
class Foreign:
    """What checkpoints of other optimizers, whose names differ, have of ours.

    Attributes:
        states: {their key: ours, or None for what is not kept}. A dimension of size 1 that ours lacks goes.
        options: (options of a saved group, our defaults) -> the options under our names.
    """

    states: Mapping[str, str | None] = field(default_factory=dict)
    options: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] = lambda saved, defaults: saved


def renamed(
    saved: Mapping[str, Any], names: Mapping[str, str | None], expected: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return ``saved`` under our names, as `Foreign.states` says, and in the shapes of ``expected`` where it can be."""
    state = {}
    for key, value in saved.items():
        name = names.get(key, key)
        if name is None:
            continue
        if name != key and isinstance(value, Tensor) and name in expected:
            value = _without_ones(value, expected[name].shape)
        state[name] = value
    return state


def _without_ones(value: Tensor, shape: torch.Size) -> Tensor:
    """``value`` less one dimension of size 1 if that makes it of this shape, else as it is."""
    views = [value.squeeze(dim) for dim in range(value.ndim) if value.shape[dim] == 1]
    return next((view for view in views if view.shape == shape), value)


def converted_state(
    saved: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    param: Tensor,
    identity: str | int,
    dims_of: Callable[[str], Dims],
) -> dict[str, Any]:
    """Return ``saved`` on the parameter's device, in the wider of the saved and the expected dtype, contiguous.

    ``expected`` is the state of a new optimizer, on the meta device; ``dims_of`` says how each goes along with a
    parameter that is a DTensor. A missing ``uid``, which only we save, is made
    from ``identity``. Raises ValueError, naming the parameter and the key, for keys or shapes that do not fit.
    """
    allowed = {"step", *expected}
    if saved.keys() - {"uid"} != allowed:
        raise ValueError(
            f"the state of parameter {identity!r} has keys {sorted(saved.keys() - {'uid'})}; allowed: {sorted(allowed)}"
        )
    state: dict[str, Any] = {
        "step": torch.as_tensor(local_of(saved["step"])).detach().to(param.device, torch.float32, copy=True),
        "uid": int(saved.get("uid", uid_of(identity))),
    }
    for key, new in expected.items():
        value, name = saved[key], f"{key} of parameter {identity!r}"
        if not isinstance(value, Tensor) or value.shape != new.shape or not value.is_floating_point():
            raise ValueError(f"{name} is {_described(value)}; allowed: floating-point of shape {tuple(new.shape)}")
        wider = torch.promote_types(value.dtype, new.dtype)
        # float64 is the one dtype that nothing here computes in
        dtype = torch.float32 if wider is torch.float64 else wider
        sharded: Any = param if new.ndim and is_sharded(param) else None
        placements = () if sharded is None else moved_placements(sharded, dims_of(key))
        local = value if new.ndim == 0 else placed(value.detach(), param, placements, name)
        local = local_of(local).detach().to(param.device, dtype, copy=True).contiguous()
        state[key] = local if sharded is None else dtensor_of(local, sharded.device_mesh, placements, new.shape)
    return state


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{name_of(value.dtype)} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
