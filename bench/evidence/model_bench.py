"""The table of `lowmem bench` for one model, on a GPU with all contenders or with those that fit, one by one.

`gpu_evidence.py` runs this. It writes <model>-bf16.csv or <model>-<layers>-layers-bf16.csv, and the table goes to the
log.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from sizes import DEVICES, TINY, layers_of, shapes_of

from lowmem_kernels.testing.models import parameter_count
from lowmem_optim.cli import bench_rows, bench_table, contenders
from lowmem_optim.cli.bench_rows import Row, Workload
from lowmem_optim.cli.contenders import Contender
from lowmem_optim.cli.record import environment

FUSED_ADAMW = "torch.AdamW(fused)"
#: What has steps of seconds over large models, all of it arithmetic, and the models that they are timed over.
SLOW, SMALL = ("SWAN",), ("gpt2", TINY)


def all_at_once(names: list[str]) -> list[list[Contender]]:
    """Everybody in one group, who take turns, as in `lowmem bench`."""
    own = contenders.ours(names, torch.bfloat16)
    return [[*contenders.others(own), *own]]


def one_by_one(names: list[str]) -> list[list[Contender]]:
    """torch's fused AdamW and ours with default options, each a group with a copy of its own, and the memory for it."""
    own = [contender for contender in contenders.ours(names, torch.bfloat16) if "nearest" not in contender.name]
    fused = [other for other in contenders.OTHERS if other.name == FUSED_ADAMW]
    return [[contender] for contender in (*fused, *own)]


def timed(work: Workload, group: list[Contender]) -> list[Row]:
    """The rows of a group, the copy first; where there is not even memory for the copy, everybody is left out."""
    try:
        return bench_rows.run(work, group, lambda *_: None)
    except torch.OutOfMemoryError:
        return [
            Row(contender.name, "ours" if contender.is_ours else "other", "not enough memory") for contender in group
        ]
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    model: Annotated[str, typer.Option(help="Whose parameters.")],
    one: Annotated[
        bool, typer.Option("--one-by-one", help="Ours and torch's fused AdamW, one after the other.")
    ] = False,
    layers: Annotated[int | None, typer.Option(help="Only the first of its layers.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="A tiny model on a CPU instead.")] = False,
) -> None:
    """Time optimizer steps over the parameters of a model in bf16."""
    torch.set_num_threads(1)
    device, rounds, taken = DEVICES[dry_run], 2 if dry_run else 30, TINY if dry_run else model
    shapes = shapes_of(taken, layers)
    count, around = parameter_count(shapes), environment(device.type)
    first = f" --layers {layers}" if layers else ""
    command = f"python bench/evidence/model_bench.py --model {model}{' --one-by-one' * one}{first}"
    name = f"{model}{f'-{layers}-layers' if layers else ''}-bf16"
    circumstances = {"model": taken, "layers": layers or layers_of(taken), "tensors": len(shapes), "parameters": count}
    circumstances |= {"dtype": "bf16", "rounds": rounds, **around, "command": command}
    names = ["AdamW", "Lomo"] if dry_run else []
    rows: list[Row] = []
    groups = (one_by_one if one else all_at_once)(names)
    if taken not in SMALL and not layers:
        groups = [[each for each in group if not each.name.startswith(SLOW)] for group in groups]
    for group in filter(None, groups):
        # of several copies the last one stays; they are the same work on the same device
        found = timed(Workload(shapes, torch.bfloat16, device, rounds), group)
        copies = [row for row in found if row.kind == "copy"] or [row for row in rows if row.kind == "copy"]
        rows = [*copies, *(row for row in rows + found if row.kind != "copy")]
        if copies:
            bench_rows.write_csv(out / f"{name}.csv", rows, count, circumstances)
    if not rows or rows[0].kind != "copy":
        raise RuntimeError("not enough memory for one contender")
    title = f"{taken}: {count / 1e6:,.1f} M parameters in {len(shapes)} tensors, bf16, {around['device']}"
    bench_table.show(Console(width=140), title, rows, count, device.type)


if __name__ == "__main__":
    typer.run(main)
