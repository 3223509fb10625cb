"""Compiles what later sections time, on all cores of the host, into Triton's cache on disk.

`gpu_evidence.py` runs this. One after the other it would take minutes.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from sizes import BENCHED

from lowmem_kernels.testing.models import model_shapes
from lowmem_optim.cli.contenders import make_tensors, ours, parameters

#: At a time; one has a layer of a model with all states on the device.
MOST_PROCESSES = 12


def first_step(model: str, name: str) -> str:
    """Take a step of one of ours over the first layer of a model; returns what was done."""
    tensors = make_tensors(model_shapes(model, 1), torch.bfloat16, torch.device("cuda"))
    contender = next(contender for contender in ours([], torch.bfloat16) if contender.name == name)
    contender.make(parameters(*tensors)).step()
    torch.cuda.synchronize()
    return f"{model}: {name}"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results; this writes none.")],
) -> None:
    """Take one step of each optimizer over one layer of each model."""
    work = list(product(BENCHED, [contender.name for contender in ours([], torch.bfloat16)]))
    workers = min(MOST_PROCESSES, os.cpu_count() or 1)
    # spawn: a process that has been forked cannot use the device
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for done in pool.map(first_step, *zip(*work, strict=True)):
            print(done, flush=True)


if __name__ == "__main__":
    typer.run(main)
