"""Facts of a device that plans depend on, and the guard round a launch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class DeviceFacts:
    """What a plan may know of a device: its name, processors, L2 capacity in bytes, lanes of a warp."""

    name: str
    sm_count: int
    l2_bytes: int
    warp_size: int


#: Stands in where there is no GPU (interpreter, ahead-of-time compilation): plans are then those of an H100/H200.
HOPPER = DeviceFacts(name="H200 (assumed)", sm_count=132, l2_bytes=50 * 2**20, warp_size=32)


@cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Return the facts of ``device``; those of ``HOPPER`` for the CPU, where kernels are only interpreted."""
    if device.type != "cuda":
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    return DeviceFacts(
        name=properties.name,
        sm_count=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        warp_size=properties.warp_size,
    )


def stream_id(device: torch.device) -> int:
    """Return the handle of the stream that work on ``device`` goes to now (0 on the CPU)."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Say whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` current: Triton launches on the current device, whatever device the pointers belong to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
