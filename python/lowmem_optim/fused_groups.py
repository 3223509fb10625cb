"""Which gradients wait for each other during a backward pass, and the buckets that they go into."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_kernels.device import stream_id

from .base import LowMemOptimizer
from .buckets import Bucket, Known, Member

#: Bytes of gradients of one launch, as of a bfloat16 matrix of 4096 x 4096. Its part of a backward pass over 4096
#: tokens takes an H100 half a millisecond (275 GFLOP, computed), and a launch costs the host half of that.
GROUP_BYTES = 32 << 20


class _Entry(NamedTuple):
    """A parameter, and what those that go into one launch with it have in common."""

    member: Member
    kind: tuple[Hashable, ...]


class GradientGroups:
    """Gradients of one kind (group, rule, device, dtypes, stream) wait until all waiting ones reach a limit of bytes.

    The limit of a device is GROUP_BYTES, or what the second largest parameter has, if that is less. What waits stays
    below it, so that with what has just arrived it is less than the two largest parameters have.

    Args:
        optimizer: whose parameters are updated.
        alone: no gradient waits for any other.
    """

    def __init__(self, optimizer: LowMemOptimizer, alone: bool) -> None:
        self._optimizer = optimizer
        self._alone = alone
        self._entries: dict[Tensor, _Entry] = {}
        self._limits: dict[torch.device, int] = {}
        self._seen: list[tuple[dict[str, Any], int]] = []
        self._known: dict[tuple[int, ...], Known] = {}
        self.forget()

    def forget(self) -> None:
        """Forget what waits."""
        self._waiting: dict[tuple[Hashable, ...], list[Tensor]] = {}
        self._bytes: dict[torch.device, int] = {}

    def refresh(self) -> None:
        """Look at the optimizer's groups again, if there are others than before or with more parameters."""
        groups = self._optimizer.param_groups
        same = len(groups) == len(self._seen) and all(
            group is known and len(group["params"]) == count
            for group, (known, count) in zip(groups, self._seen, strict=True)
        )
        if same:
            return
        self._seen = [(group, len(group["params"])) for group in groups]
        self._known = {}
        self._entries = {}
        for member in self._optimizer.members():
            rule = self._optimizer.rule_of(member.param, member.group)
            self._entries[member.param] = _Entry(member, (id(member.group), rule))
        self._limits = {}

    def arrived(self, param: Tensor) -> list[Tensor]:
        """Return the parameters to be updated now that this one's gradient is there: itself among others, or none."""
        grad, device = param.grad, param.device
        assert grad is not None
        kind = (*self._entries[param].kind, device, param.dtype, grad.dtype, stream_id(device))
        self._waiting.setdefault(kind, []).append(param)
        self._bytes[device] = self._bytes.get(device, 0) + _bytes(grad)
        if self._alone or self._bytes[device] >= self._limit(device):
            return self._leave(kind)
        return []

    def _limit(self, device: torch.device) -> int:
        if device not in self._limits:
            trained = (param for param in self._entries if param.requires_grad and param.device == device)
            sizes = sorted(map(_bytes, trained))
            self._limits[device] = min(GROUP_BYTES, sizes[-2] if len(sizes) > 1 else 0)
        return self._limits[device]

    def identities(self, params: list[Tensor]) -> list[str | int]:
        """Return the name of each parameter, or its position where the optimizer has no names."""
        return [self._entries[param].member.identity for param in params]

    def waits(self) -> bool:
        """Whether any gradient waits."""
        return bool(self._waiting)

    def all_waiting(self) -> list[list[Tensor]]:
        """Return what still waits, group by group; then nothing does."""
        return [self._leave(kind) for kind in [*self._waiting]]

    def _leave(self, kind: tuple[Hashable, ...]) -> list[Tensor]:
        params = self._waiting.pop(kind)
        device = params[0].device
        self._bytes[device] -= sum([_bytes(param.grad) for param in params if param.grad is not None])
        _hold_for_stream(params, kind[-1])
        return params

    def buckets(self, params: list[Tensor]) -> list[Bucket]:
        """Return buckets of parameters with their gradients: those of the last time, if only gradients are new."""
        key = tuple(map(id, params))
        if key not in self._known and len(self._known) > 2 * len(self._entries):
            # a backward pass whose order is never the same
            self._known = {}
        state = self._optimizer.state
        known = self._optimizer.sorted(
            params,
            [param.grad for param in params],
            lambda: [self._entries[param].member for param in params],
            lambda: [state.get(param) for param in params],
            self._known.get(key),
        )
        self._known[key] = known
        return known.buckets


def free_gradients(params: Iterable[Tensor], buckets: Iterable[Bucket]) -> None:
    """Drop all references to gradients that parameters and buckets have."""
    for param in params:
        param.grad = None
    for bucket in buckets:
        bucket.grads.clear()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _hold_for_stream(params: list[Tensor], stream: Hashable) -> None:
    """Tell torch's allocator where gradients of another stream than the current one are read before they are freed."""
    device = params[0].device
    if stream_id(device) != stream:
        for param in params:
            if param.grad is not None:
                param.grad.record_stream(torch.cuda.current_stream(device))
