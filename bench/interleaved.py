"""What benchmarks on one thread of a CPU share: contenders that take turns on matrices of their own, and records."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from lowmem_optim.cli.timing import Step, Stopwatch, interleaved

CPU = torch.device("cpu")


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
    """Return the seconds of this thread in each step; see `lowmem_optim.cli.timing`."""
    with Progress() as progress:
        task = progress.add_task(label, total=rounds * len(steps))
        times = interleaved(steps, rounds, Stopwatch(CPU), lambda _: progress.advance(task))
    seconds = {name: [time.step for time in values] for name, values in times.items()}
    return {name: Seconds(statistics.median(values), min(values)) for name, values in seconds.items()}


def write_record(out: Path, command: str, figures: object) -> None:
    """Write figures as JSON, with the command that makes them and what it ran on."""
    record = {
        "command": command,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "figures": figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
