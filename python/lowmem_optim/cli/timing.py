"""Times of steps that take turns: on a GPU the device's own between events, on a CPU those of the thread or the clock.

Before each step the caches are overwritten, as a backward pass would do.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType

Step = Callable[[], object]

# what caches hold is overwritten twice over; without a figure for a CPU's, that of a large server's
FLUSHED = 2
UNKNOWN_CACHE_BYTES = 64 * 2**20
# overwrites of a GPU's cache before a step: they keep it busy for a while, so that the step's first launches are
# queued when it gets to them, as after a backward pass
HEAD_START = 16


class Seconds(NamedTuple):
    """Of one step: until it was done, and until its call returned (None on a CPU, where that is the same)."""

    step: float
    host: float | None


class Stopwatch:
    """Times single steps on a device.

    On a GPU a step lasts from an event before to an event after it; on a CPU with one thread it is what the thread
    computed, without the time in which another process had the core; with more threads it is what the clock says.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _cpu_cache_bytes()
        self._buffer = torch.empty(FLUSHED * cache, dtype=torch.uint8, device=device)
        self._clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self, step: Step) -> Seconds:
        """Overwrites the caches, takes the step, and waits for it."""
        return self._on_gpu(step) if self.device.type == "cuda" else self._on_cpu(step)

    def flush(self) -> None:
        """Overwrites the caches; on a GPU when it gets to it."""
        self._buffer.zero_()

    def _on_cpu(self, step: Step) -> Seconds:
        self.flush()
        start = self._clock()
        step()
        return Seconds(self._clock() - start, None)

    def _on_gpu(self, step: Step) -> Seconds:
        with torch.cuda.device(self.device):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            for _ in range(HEAD_START):
                self.flush()
            before.record()
            start = time.perf_counter()
            step()
            host = time.perf_counter() - start
            after.record()
            torch.cuda.synchronize()
            return Seconds(before.elapsed_time(after) / 1e3, host)


def interleaved(
    steps: Mapping[str, Step], rounds: int, stopwatch: Stopwatch, advance: Callable[[str], object]
) -> dict[str, list[Seconds]]:
    """The times of `rounds` steps of each, after one that is not counted.

    Steps take turns, so that whatever else the machine does hits them alike. `advance` is called with a step's name
    after each that is counted.
    """
    for step in steps.values():
        step()
    times: dict[str, list[Seconds]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(stopwatch(step))
            advance(name)
    return times


def count_launches(step: Step, device: torch.device) -> int | None:
    """How many kernels a step launches, without copies and memsets by the driver; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize(device)
    on_device = [e for e in profile.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def _cpu_cache_bytes() -> int:
    """Size of the largest cache, which Linux alone reports."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = file.read_text().strip()[:-1], file.read_text().strip()[-1]
        sizes.append(int(number) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit])
    return max(sizes, default=UNKNOWN_CACHE_BYTES)
