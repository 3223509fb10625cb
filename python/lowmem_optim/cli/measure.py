"""Time and memory, measured so that figures of different optimizers compare."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

SAMPLED = 2**14  # elements of each parameter, enough for a root mean square within some percent


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock once the device has finished all work submitted to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps between steps."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


def grad_norm(params: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, in float32 whatever their dtype."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in params if p.grad is not None]
    return torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()


class Updates:
    """What a step adds to parameters, by a sample of the elements of each, of those that are in this process."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._flat = [(p.to_local() if isinstance(p, DTensor) else p).detach().flatten() for p in params]
        self._before = [self._sample(flat).clone() for flat in self._flat]

    def sums(self) -> Tensor:
        """The sum of squares of the update since construction, scaled up to all elements, and their number."""
        changes = [self._sample(flat).float() - before for flat, before in zip(self._flat, self._before, strict=True)]
        squares = [flat.numel() * c.square().mean() for flat, c in zip(self._flat, changes, strict=True) if len(c)]
        count = torch.tensor(sum(flat.numel() for flat in self._flat), dtype=torch.float32)
        total = torch.stack(squares).sum() if squares else torch.zeros(())
        return torch.stack([total, count.to(total.device)])

    @staticmethod
    def _sample(flat: Tensor) -> Tensor:
        if len(flat) <= SAMPLED:
            return flat
        # at random, and always the same: with evenly spaced ones a matrix might show a single column
        generator = torch.Generator().manual_seed(0)
        return flat[torch.randint(len(flat), (SAMPLED,), generator=generator).to(flat.device)]


class PeakMemory:
    """Peak memory since construction, above what was in use then.

    On CUDA: bytes allocated to tensors. On the CPU: the process's resident bytes, which Linux alone reports.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start: int | None = torch.cuda.memory_allocated(device)
        else:
            _return_freed_memory()
            self._start = _reset_peak_resident()

    def growth(self) -> int | None:
        """Peak in bytes above the start; None where the operating system does not tell."""
        if self._start is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _peak_resident()
        return peak - self._start


def temporary_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """What a step needs on top at its peak, in bytes, once its state exists; None where nothing tells.

    That counts all that a step allocates, also inside torch; on a CPU where its pages are touched.
    """
    memory = PeakMemory(device)
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return memory.growth()


def _return_freed_memory() -> None:
    """Hands freed heap pages back, since a later run would otherwise reuse them and appear to need less."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _reset_peak_resident() -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: set the peak to the present size; see proc(5)
        return _peak_resident()
    except OSError:
        return None


def _peak_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status does not tell the peak resident size")
