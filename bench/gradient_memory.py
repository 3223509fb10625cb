"""Bytes of gradients that are alive in a backward pass, with and without the update in it.

    python bench/gradient_memory.py --out bench/results/gradient_memory.json

A byte-level Llama with random weights takes two steps in every mode; what counts is the second. Gradients are counted
by hooks, whenever one arrives. "Allocated" is the peak of all tensors of the backward pass above what there was before
it: counted operation by operation on a CPU, where scratch inside an operation is not seen, and by torch's allocator on
a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from interleaved import write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowmem_kernels.testing.allocations import Allocations, LiveGradients
from lowmem_optim import AdaLomo, SinkGD, fuse_backward, split_params
from lowmem_optim.base import LowMemOptimizer
from lowmem_optim.cli.loop import DTYPES
from lowmem_optim.cli.model import ByteModel, ModelConfig
from lowmem_optim.fused_backward import FusedBackward

MIB = 2**20


class Mode(NamedTuple):
    """A way to take a step: an optimizer, and backward passes of two micro-batches; None for ordinary ones."""

    optimizer: Callable[[ByteModel], LowMemOptimizer]
    backward: Callable[[FusedBackward, Tensor, Tensor], None] | None


def adalomo(model: ByteModel) -> LowMemOptimizer:
    """Return an optimizer with one rule for all parameters."""
    return AdaLomo(model.named_parameters())


def accumulated(handle: FusedBackward, first: Tensor, second: Tensor) -> None:
    """Update by the sum of two gradients."""
    with handle.accumulate():
        handle.backward(first)
    handle.backward(second)


MODES = {
    "ordinary step": Mode(adalomo, None),
    "fused": Mode(adalomo, lambda handle, first, second: handle.backward(first)),
    "fused, exact=True": Mode(adalomo, lambda handle, first, second: handle.backward(first, exact=True)),
    "fused, SinkGD and its fallback": Mode(
        lambda model: SinkGD(split_params(model)), lambda handle, first, second: handle.backward(first)
    ),
    "fused, two micro-batches": Mode(adalomo, accumulated),
}


def measure(mode: Mode, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Return the peaks of the gradients' bytes, and of all that a backward pass allocates."""
    torch.manual_seed(0)
    model = ByteModel(config).to(device, dtype)
    tokens = torch.randint(0, 256, (1, config.context), device=device)
    gradients = LiveGradients([*model.parameters()])
    optimizer = mode.optimizer(model)
    handle = None if mode.backward is None else fuse_backward(model, optimizer)
    allocated = 0
    for _ in range(2):
        gradients.peak = 0
        first, second = (model.loss(tokens, tokens) for _ in range(2))
        with allocated_on(device) as allocations:
            if handle is None or mode.backward is None:
                first.backward()
            else:
                mode.backward(handle, first, second)
        allocated = allocations.peak
        optimizer.step()
        optimizer.zero_grad()
    return gradients.peak, allocated


class AllocatedOnGpu:
    """As `Allocations`, by torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0

    def __enter__(self) -> AllocatedOnGpu:
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        self.peak = torch.cuda.max_memory_allocated(self.device) - self.before


def allocated_on(device: torch.device) -> Allocations | AllocatedOnGpu:
    """Return what counts on this device."""
    return AllocatedOnGpu(device) if device.type == "cuda" else Allocations()


def main(
    layers: Annotated[int, typer.Option(help="Transformer layers.")] = 24,
    dim: Annotated[int, typer.Option(help="Width, a multiple of 32.")] = 512,
    context: Annotated[int, typer.Option(help="Bytes of the one sequence.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of parameters and gradients: fp32 or bf16.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Compare what gradients take with and without the update in the backward pass."""
    config = ModelConfig.from_width(layers, dim, context)
    model = ByteModel(config).to(DTYPES[dtype])
    sizes = sorted((param.nbytes for param in model.parameters()), reverse=True)
    figures: dict[str, object] = {
        "parameters": sum(sizes),
        "two_largest_layers": 2 * sum(param.nbytes for param in model.blocks[0].parameters()),
        "two_largest_parameters": sizes[0] + sizes[1],
    }
    table = Table(title=f"{layers} layers of width {dim}, {dtype}, {device}: MiB")
    for column in ("", "gradients alive at a time", "allocated in the backward pass"):
        table.add_column(column, justify="left" if not column else "right")
    for name, size in figures.items():
        table.add_row(name.replace("_", " "), f"{size / MIB:.2f}", "")  # type: ignore[operator]
    table.add_section()
    for name, mode in MODES.items():
        alive, allocated = measure(mode, config, DTYPES[dtype], torch.device(device))
        figures[name] = {"gradients": alive, "allocated": allocated}
        table.add_row(name, f"{alive / MIB:.2f}", f"{allocated / MIB:.2f}")
    Console().print(table)
    if out is not None:
        options = f"--layers {layers} --dim {dim} --context {context} --dtype {dtype} --device {device}"
        write_record(out, f"python bench/gradient_memory.py {options}", figures)


if __name__ == "__main__":
    typer.run(main)
