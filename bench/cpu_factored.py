"""Time and memory of a step of optimizers with factored second moments on a CPU, ours against the usual ones.

    python bench/cpu_factored.py --out bench/results/cpu_factored.json

One thread, one matrix, and contenders that take turns in one run. What counts are the ratios. Temporaries are what the
process's resident memory grows by in a step, at its peak, above parameter, gradient and state.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import came_pytorch
import torch
import transformers
import typer
from interleaved import CPU, copier, measured_seconds, parameter, stepper, write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowmem_optim import CAME, Adafactor, TorchAdafactor
from lowmem_optim.cli.loop import DTYPES
from lowmem_optim.cli.measure import temporary_bytes
from lowmem_optim.cli.timing import Step

Make = Callable[..., torch.optim.Optimizer]

MOMENTUM = {"beta1": 0.9}
DECAY = {"weight_decay": 0.01}
TORCH: dict[str, Make] = {
    "torch.optim.Adafactor(foreach=False)": lambda p: torch.optim.Adafactor(p, foreach=False),
    "torch.optim.Adafactor(foreach=True)": lambda p: torch.optim.Adafactor(p, foreach=True),
}

# group -> (what others have, ours); ours takes stochastic_rounding, and bfloat16 is measured with and without
GROUPS: dict[str, tuple[dict[str, Make], dict[str, Make]]] = {
    "Adafactor": (
        {"transformers.Adafactor": transformers.Adafactor, **TORCH},
        {"Adafactor": Adafactor},
    ),
    "torch's Adafactor": (TORCH, {"TorchAdafactor": TorchAdafactor}),
    "with momentum": (
        {"transformers.Adafactor(beta1=0.9)": lambda p: transformers.Adafactor(p, **MOMENTUM)},
        {"Adafactor(beta1=0.9)": lambda p, **options: Adafactor(p, **MOMENTUM, **options)},
    ),
    "with weight decay": (
        {"transformers.Adafactor(weight_decay=0.01)": lambda p: transformers.Adafactor(p, **DECAY)},
        {"Adafactor(weight_decay=0.01)": lambda p, **options: Adafactor(p, **DECAY, **options)},
    ),
    "CAME": (
        {"came_pytorch.CAME": lambda p: came_pytorch.CAME(p, lr=2e-4)},
        {"CAME": lambda p, **options: CAME(p, lr=2e-4, **options)},
    ),
}


def contenders(group: str, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Step]]:
    """Return how to make the steps of a group, by name, those of others first."""
    others, ours = GROUPS[group]
    makers: dict[str, Callable[[Tensor], Step]] = {
        name: lambda p, make=make: stepper(make([p])) for name, make in others.items()
    }
    for name, make in ours.items():
        for rounding in (False, True) if dtype == torch.bfloat16 else (False,):
            label = name if dtype != torch.bfloat16 else f"{name}, {'stochastic' if rounding else 'to nearest'}"
            makers[label] = lambda p, make=make, rounding=rounding: stepper(make([p], stochastic_rounding=rounding))
    return makers


def measure(group: str, size: int, dtype: torch.dtype, rounds: int, label: str) -> dict[str, dict[str, object]]:
    """Return the figures of each contender of a group."""
    p_bytes = size * size * dtype.itemsize
    steps = {name: make(parameter(size, dtype)) for name, make in contenders(group, dtype).items()}
    seconds = measured_seconds({"copy": copier(size, dtype), **steps}, rounds, label)
    figures: dict[str, dict[str, object]] = {}
    for name, step in steps.items():
        temporaries = temporary_bytes(step, CPU)
        figures[name] = {
            "copies": round(seconds[name].median / seconds["copy"].median, 2),
            "temporaries": None if temporaries is None else round(temporaries / p_bytes, 3),
        }
        if name not in GROUPS[group][0]:
            figures[name]["times_faster_than"] = {
                other: {
                    "medians": round(seconds[other].median / seconds[name].median, 2),
                    "least": round(seconds[other].least / seconds[name].least, 2),
                }
                for other in GROUPS[group][0]
            }
    return figures


def show(console: Console, title: str, groups: dict[str, dict[str, dict[str, object]]]) -> None:
    """Print the figures of one dtype."""
    table = Table(
        title=title,
        caption="an interleaved run for each group, medians (least disturbed steps); temporaries at their peak",
    )
    table.add_column(no_wrap=True)
    for column in (
        "copies of\nthe parameter",
        "temporaries,\nparameters",
        "times faster than the others,\nin their order",
    ):
        table.add_column(column, justify="right")
    for rows in groups.values():
        for name, row in rows.items():
            faster = row.get("times_faster_than", {})
            ratios = [f"{ratio['medians']} ({ratio['least']})" for ratio in faster.values()]
            table.add_row(name, f"{row['copies']}", f"{row['temporaries']}", "\n".join(ratios))
        table.add_section()
    console.print(table)


def main(
    size: Annotated[int, typer.Option(help="Rows and columns of the matrix.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Steps of each contender.")] = 15,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Compare steps of optimizers with factored second moments on one thread of this CPU."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console()
    figures = {}
    for name, dtype in DTYPES.items():
        figures[name] = {
            group: measure(group, size, dtype, rounds, f"{size} x {size} {name}, {group}") for group in GROUPS
        }
        show(console, f"{size} x {size} {name}, one thread: a step", figures[name])
    if out is not None:
        write_record(out, f"python bench/cpu_factored.py --size {size} --rounds {rounds}", figures)
        console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
