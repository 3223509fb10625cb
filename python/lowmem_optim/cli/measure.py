"""Time and memory, measured so that figures of different optimizers compare."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.optim import Optimizer


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock once the device has finished all work submitted to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps between steps."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


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
