"""What benchmarks on one thread of a CPU share: contenders that take turns on matrices of their own, and records."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from lowmem_optim.cli.measure import PeakMemory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], object]


class Seconds(NamedTuple):
    """Of many measurements: the median, and the least, which is that of the step that was disturbed least."""

    median: float
    least: float


def stepper(optimizer: torch.optim.Optimizer) -> Step:
    """Return the optimizer's step."""
    return optimizer.step


def parameter(size: int, dtype: torch.dtype) -> Tensor:
    """Return a square parameter with a gradient."""
    p = torch.nn.Parameter(torch.randn(size, size).to(dtype))
    p.grad = (torch.randn(size, size) * 1e-3).to(dtype)
    return p


def copier(size: int, dtype: torch.dtype) -> Step:
    """Return a copy of such a parameter to another."""
    source, target = parameter(size, dtype).detach(), parameter(size, dtype).detach()
    return lambda: target.copy_(source)


def measured_seconds(steps: Mapping[str, Step], rounds: int, label: str) -> dict[str, Seconds]:
    """Return the seconds of this thread in each step, after one that is not counted.

    Steps take turns, so that whatever else the machine does hits them alike, and time in which another process has the
    core is not counted.
    """
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(rounds), description=label):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            seconds[name].append(time.thread_time() - start)
    return {name: Seconds(statistics.median(values), min(values)) for name, values in seconds.items()}


def temporary_bytes(step: Step) -> int | None:
    """Return by how much the process's resident memory grows in a step, at its peak; None where nothing tells.

    That counts all that a step allocates, also inside torch, where its pages are touched. State has to exist already.
    """
    memory = PeakMemory(torch.device("cpu"))
    step()
    return memory.growth()


def write_record(out: Path, command: str, figures: object) -> None:
    """Write figures as JSON, with the command that makes them and what it ran on."""
    record = {
        "command": command,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "figures": figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
