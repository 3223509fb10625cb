"""Averages gradients over processes with equal models, group by group, before they are used."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Replicas:
    """The processes that train the same model, and what this one has averaged in this backward pass.

    All of them average the same groups in the same order, as long as their backward passes are alike. `end` compares
    what they did, and `check` raises where it differed.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._size = dist.get_world_size(group)
        self._device = device
        self._did = 0
        self._verdict: tuple[Callable[[], bool], Tensor] | None = None

    def average(self, params: list[Tensor], identities: list[str | int]) -> Callable[[], object]:
        """Start to average the gradients of parameters of one dtype and device; return what waits for it.

        Several become parts of one vector, which is what is sent.
        """
        grads = [param.grad for param in params if param.grad is not None]
        self._did = zlib.crc32(repr(identities).encode(), self._did)
        vectors = [grad.reshape(-1) for grad in grads]
        flat = (vectors[0] if len(vectors) == 1 else torch.cat(vectors)).div_(self._size)
        sizes = [grad.numel() for grad in grads]
        for param, part in zip(params, flat.split(sizes), strict=True):
            param.grad = part.view(param.shape)
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        wait: Callable[[], object] = work.wait
        return wait

    def end(self) -> None:
        """Compare with the other processes what each has averaged in this pass."""
        # without waiting for the device, for which a tensor of numbers would
        both = torch.full((2,), self._did, device=self._device)
        both[1] = -self._did
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        self._did = 0
        if self._device.type == "cuda":
            # looked at in a later pass, when it has long been there
            done = torch.cuda.Event()
            both = both.to("cpu", non_blocking=True)
            done.record(torch.cuda.current_stream(self._device))
            self._verdict = done.query, both
        else:
            self._verdict = (lambda: True), both
            self.check()

    def check(self) -> None:
        """Raise RuntimeError if the processes are known to have averaged different gradients."""
        if self._verdict is None or not self._verdict[0]():
            return
        high, low = self._verdict[1].tolist()
        self._verdict = None
        if high != -low:
            raise RuntimeError(
                "processes have updated different parameters in one backward pass, so their models differ now; "
                "allowed: every process uses the same parameters in the same order"
            )


def find_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel that a model is or contains."""
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


class Unsynchronized:
    """Keeps a DistributedDataParallel from averaging gradients itself, which would be after they are used."""

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        self._wrapper = wrapper
        self._before = wrapper.require_backward_grad_sync
        wrapper.require_backward_grad_sync = False
        # buffers are sent all the same, as after a forward pass whose gradients it would average
        self._hook = wrapper.register_forward_pre_hook(_sends_buffers)

    def undo(self) -> None:
        """Let it average again."""
        self._hook.remove()
        self._wrapper.require_backward_grad_sync = self._before


def _sends_buffers(wrapper: nn.Module, inputs: Iterable[Any]) -> None:
    wrapper.require_forward_param_sync = True  # type: ignore[assignment]
