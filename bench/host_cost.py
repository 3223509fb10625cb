"""Host time of an optimizer step over the 291 tensors of Llama 7B, by a driver that launches nothing.

    python bench/host_cost.py --out bench/results/host_cost.json

One thread. What is timed is all that `step()` does on the host until kernels are handed to the driver, which is a
stand-in; what the driver itself takes for a launch, and copies to a device, come on top. Tensors have a 32nd of each of
the model's dimensions, since nothing is computed: the host's work depends on how many there are, not on their sizes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from interleaved import write_record
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from lowmem_kernels.testing.fake_driver import FakeDriver, fake_driver
from lowmem_kernels.testing.models import model_shapes
from lowmem_optim.cli.contenders import Contender, ours

MODEL, SHRUNK = "llama-7b", 32
#: Steps before those that are timed: they make the state, compile, and find out what later ones remember.
WARM_UP = 3
Replace = Callable[[list[nn.Parameter]], object]


def keep(params: list[nn.Parameter]) -> None:
    """Leave gradients where they are, as after ``zero_grad(set_to_none=False)``."""


def move(params: list[nn.Parameter]) -> list[torch.Tensor | None]:
    """Put all gradients into new places; returns the old ones, whose memory is taken as long as they live."""
    old = [param.grad for param in params]
    for param in params:
        param.grad = torch.empty_like(param)
    return old


#: What happens to the gradients between two steps.
GRADIENTS: dict[str, Replace] = {"same_place": keep, "new_places": move}


def make_params(layers: int | None, dtype: torch.dtype) -> list[nn.Parameter]:
    """Return small tensors in place of the model's, with gradients; values do not matter."""
    shapes = model_shapes(MODEL, layers).values()
    params = [nn.Parameter(torch.zeros([max(1, size // SHRUNK) for size in shape], dtype=dtype)) for shape in shapes]
    move(params)
    return params


@contextmanager
def no_gpu() -> Iterator[FakeDriver]:
    """Let this package's optimizers launch kernels for CPU tensors, by a driver that counts them."""
    with patch.dict(os.environ, LOWMEM_BACKEND="triton"), fake_driver() as gpu:
        yield gpu


def microseconds(contender: Contender, layers: int | None, steps: int, replace: Replace) -> dict[str, float]:
    """Return the median and the least host time of a step."""
    params = make_params(layers, torch.bfloat16)
    with no_gpu():
        optimizer = contender.make(params)
        times = []
        for i in range(WARM_UP + steps):
            old = replace(params)
            start = time.thread_time()
            optimizer.step()
            if i >= WARM_UP:
                times.append(1e6 * (time.thread_time() - start))
            del old
    return {"median_us": round(statistics.median(times), 1), "least_us": round(min(times), 1)}


def launches(contender: Contender, layers: int | None) -> int:
    """Return how many kernels a step launches."""
    params = make_params(layers, torch.bfloat16)
    with no_gpu() as gpu:
        optimizer = contender.make(params)
        optimizer.step()
        before = gpu.count_launches()
        optimizer.step()
        return gpu.count_launches() - before


def main(
    optimizer: Annotated[list[str] | None, typer.Option("-o", "--optimizer", help="Only these of ours.")] = None,
    layers: Annotated[int | None, typer.Option(help="Only the first N layers.")] = None,
    steps: Annotated[int, typer.Option(help="Steps that are timed.", min=1)] = 100,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Time the host's share of optimizer steps without a GPU."""
    torch.set_num_threads(1)
    # with default rounding only: the host does the same for both
    chosen = ours(optimizer or [], torch.float32)
    tensors = len(model_shapes(MODEL, layers))
    figures: dict[str, dict[str, object]] = {}
    for contender in track(chosen, "host time"):
        figures[contender.name] = {
            "launches": launches(contender, layers),
            **{name: microseconds(contender, layers, steps, replace) for name, replace in GRADIENTS.items()},
        }
    table = Table(title=f"host µs of a step, {tensors} tensors: median (least)")
    for column in ("", "launches", *(name.replace("_", " ") for name in GRADIENTS)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in figures.items():
        cells = [f"{row[kind]['median_us']:,.0f} ({row[kind]['least_us']:,.0f})" for kind in GRADIENTS]  # type: ignore[index]
        table.add_row(name, str(row["launches"]), *cells)
    console = Console()
    console.print(table)
    if out is not None:
        command = f"python bench/host_cost.py --steps {steps}"
        command += "" if layers is None else f" --layers {layers}"
        command += "".join(f" --optimizer {name}" for name in optimizer or [])
        write_record(out, command, {"model": MODEL, "tensors": tensors, "optimizers": figures})
        console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
