"""Time of an optimizer step on a CPU, against what one would pick otherwise.

    python bench/cpu_step.py --out bench/results/cpu_step.json

One thread, one matrix; contenders take turns in one run, so that whatever else the machine does hits them alike. What
counts are the ratios: to one copy of the parameter, and to the baseline of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from interleaved import copier, measured_seconds, parameter, stepper, write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lowmem_optim import AdamW, Lomo
from lowmem_optim.cli.loop import DTYPES
from lowmem_optim.cli.timing import Step


def clipped_sgd(p: Tensor) -> Step:
    """Return SGD after torch's clipping, which reads the gradient, then reads and writes it."""
    optimizer = torch.optim.SGD([p], lr=1e-3)

    def step() -> None:
        clip_grad_norm_([p], 1.0)
        optimizer.step()

    return step


# group -> contender -> how to make its step; the first of a group is its baseline
CONTENDERS: dict[str, dict[str, Callable[[Tensor], Step]]] = {
    "AdamW": {
        "torch.optim.AdamW(fused=True)": lambda p: stepper(torch.optim.AdamW([p], fused=True)),
        "torch.optim.AdamW(foreach=False)": lambda p: stepper(torch.optim.AdamW([p], foreach=False)),
        "AdamW, to nearest": lambda p: stepper(AdamW([p], stochastic_rounding=False)),
        "AdamW": lambda p: stepper(AdamW([p])),
        'AdamW(state_dtype="param")': lambda p: stepper(AdamW([p], state_dtype="param")),
    },
    "gradient descent": {
        "torch.optim.SGD": lambda p: stepper(torch.optim.SGD([p], lr=1e-3)),
        "Lomo, to nearest": lambda p: stepper(Lomo([p], stochastic_rounding=False)),
        "Lomo": lambda p: stepper(Lomo([p])),
    },
    "clipped gradient descent": {
        "clip_grad_norm_ and torch.optim.SGD": clipped_sgd,
        "Lomo(clip_grad_norm=1), to nearest": lambda p: stepper(
            Lomo([p], clip_grad_norm=1.0, stochastic_rounding=False)
        ),
        "Lomo(clip_grad_norm=1)": lambda p: stepper(Lomo([p], clip_grad_norm=1.0)),
    },
}


def measure(size: int, dtype: torch.dtype, rounds: int, label: str) -> dict[str, float]:
    """Return the median seconds of each contender's step, and of one copy under the name "copy"."""
    steps = {"copy": copier(size, dtype)}
    for group in CONTENDERS.values():
        steps.update({name: make(parameter(size, dtype)) for name, make in group.items()})
    return {name: seconds.median for name, seconds in measured_seconds(steps, rounds, label).items()}


def main(
    size: Annotated[int, typer.Option(help="Rows and columns of the matrix.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Steps of each contender.")] = 15,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Compare steps of optimizers on one thread of this CPU."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures = {}
    for name, dtype in DTYPES.items():
        seconds = measure(size, dtype, rounds, f"{size} x {size} {name}")
        figures[name] = {
            group: {
                contender: {
                    "copies": round(seconds[contender] / seconds["copy"], 2),
                    "of_baseline": round(seconds[contender] / seconds[next(iter(contenders))], 2),
                }
                for contender in contenders
            }
            for group, contenders in CONTENDERS.items()
        }
    console = Console()
    for name, groups in figures.items():
        table = Table(
            title=f"{size} x {size} {name}, one thread: time of a step", caption="medians of one interleaved run"
        )
        table.add_column(no_wrap=True)
        table.add_column("copies of the parameter", justify="right")
        table.add_column("of the baseline", justify="right")
        for contenders in groups.values():
            for contender, row in contenders.items():
                table.add_row(contender, f"{row['copies']:.1f}", f"{row['of_baseline']:.2f}")
            table.add_section()
        console.print(table)
    if out is not None:
        write_record(out, f"python bench/cpu_step.py --size {size} --rounds {rounds}", figures)
        console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
