"""Turning saved state, ours or that of torch.optim and its kin, into state of a parameter here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowmem_kernels.numerics import name_of


def uid_of(identity: str | int) -> int:
    """Return what tells a parameter's rounding noise from another's: a position itself, or 56 bits of a name's hash."""
    if isinstance(identity, int):
        return identity
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=7).digest(), "little")


def converted_state(
    saved: Mapping[str, Any], expected: Mapping[str, Tensor], param: Tensor, identity: str | int
) -> dict[str, Any]:
    """Return ``saved`` on the parameter's device, in the wider of the saved and the expected dtype, contiguous.

    ``expected`` is the state of a new optimizer, on the meta device. A missing ``uid``, which only we save, is made
    from ``identity``. Raises ValueError, naming the parameter and the key, for keys or shapes that do not fit.
    """
    allowed = {"step", *expected}
    if saved.keys() - {"uid"} != allowed:
        raise ValueError(
            f"the state of parameter {identity!r} has keys {sorted(saved.keys() - {'uid'})}; allowed: {sorted(allowed)}"
        )
    state: dict[str, Any] = {
        "step": torch.as_tensor(saved["step"]).detach().to(param.device, torch.float32, copy=True),
        "uid": int(saved.get("uid", uid_of(identity))),
    }
    for key, like in expected.items():
        value, name = saved[key], f"{key} of parameter {identity!r}"
        if not isinstance(value, Tensor) or value.shape != like.shape or not value.is_floating_point():
            raise ValueError(f"{name} is {_described(value)}; allowed: floating-point of shape {tuple(like.shape)}")
        wider = torch.promote_types(value.dtype, like.dtype)
        # float64 is the one dtype that nothing here computes in
        dtype = torch.float32 if wider is torch.float64 else wider
        state[key] = value.detach().to(param.device, dtype, copy=True).contiguous()
    return state


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{name_of(value.dtype)} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
