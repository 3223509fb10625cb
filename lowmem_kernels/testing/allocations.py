"""Bytes of tensors that are alive while something runs, on a CPU, where torch counts none itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """A context that counts the bytes of tensors made in it, backward passes on the CPU included, as long as they live.

    What an operation uses and frees inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and count the storages of its results that are new."""
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._sizes or key in given:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class LiveGradients:
    """Counts the bytes of ``.grad`` of parameters whenever one arrives; its hooks come before those made later."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.peak = 0
        self._hooks = [param.register_post_accumulate_grad_hook(self._look) for param in params]

    def _look(self, _: Tensor) -> None:
        self.peak = max(self.peak, sum([param.grad.nbytes for param in self.params if param.grad is not None]))

    def remove(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
