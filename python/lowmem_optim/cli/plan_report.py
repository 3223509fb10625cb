"""A plan as a table, as one sentence, and as JSON."""

import re
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lowmem_optim.cli.arguments import ABSENT
from lowmem_optim.cli.files import json_of
from lowmem_optim.cli.plan_advice import GB, recommendation
from lowmem_optim.cli.plan_memory import PARTS, Row, Setting, largest_two
from lowmem_optim.cli.plan_model import Model

WIDTH = 116  # below that figures would be cut
UNITS = {"MB": 10**6, "GB": GB, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

#: Headers that would take too much room in one line.
HEADERS = {"temporaries": "tempo-\nraries", "activations": "activa-\ntions", "communication": "communi-\ncation"}

NOTE = (
    "1 GB is 1e9 bytes; all is of each device. Parameters, gradients and state are those of the optimizers on the meta "
    "device; temporaries, activations and communication are estimates (docs/planning.md). The total is the sum, though "
    "not all of it is alive at a time; the device's context and fragmentation are not in it."
)


def size_of(text: str) -> int:
    """Bytes of a text such as 24GB or 80GiB. Raises ValueError for another text."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS or not float(found[1]):
        raise ValueError(f"{text!r} is not a size; allowed: a number > 0 with MB, GB, TB, MiB, GiB or TiB, as in 24GB")
    return round(float(found[1]) * UNITS[found[2].upper()])


def title_of(model: Model, setting: Setting) -> str:
    """One line: the model, and how it is trained."""
    count = sum(param.numel() for param in model.module.parameters()) / 1e6
    parameters = f"{count / 1e3:,.3f} G" if count >= 1e3 else f"{count:,.3f} M"
    devices = "" if setting.sharding == "none" else f", {setting.sharding.upper()} of {setting.ranks}"
    dtype = {2: "bf16", 4: "fp32"}[setting.dtype.itemsize]
    checkpoints = ", activation checkpointing" if setting.checkpointing else ""
    return (
        f"{model.name}: {parameters} parameters, {dtype}, {setting.batch} x {setting.sequence} tokens"
        f"{checkpoints}{devices}"
    )


def show(console: Console, title: str, rows: list[Row], setting: Setting, gpu: int | None) -> None:
    """Prints the table and what it does not say by itself."""
    console = Console(file=console.file, width=max(console.width, WIDTH))
    console.print(f"\n{title}", highlight=False, markup=False)
    parts = [part for part in PARTS if part != "communication" or setting.sharding != "none"]
    unit, size = unit_of(rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("optimizer", "step"):
        table.add_column(name, no_wrap=True)
    for name in (*parts, "total"):
        header = f"{name},\n{unit}" if name == "total" else HEADERS.get(name, name)
        table.add_column(header, justify="right", no_wrap=True)
    if gpu is not None:
        table.add_column(f"fits in\n{round(gpu / size, 2):,.10g} {unit}", justify="right", no_wrap=True)
    for row in rows:
        cells = [_figure(getattr(row, part), size) for part in (*parts, "total")]
        fits = [] if gpu is None else ["yes" if row.total <= gpu else f"{(row.total - gpu) / size:,.1f} over"]
        table.add_row(row.optimizer, row.mode, *cells, *fits)
    console.print(table)
    console.print(NOTE, highlight=False)
    for note in notes(rows, setting):
        console.print(note, highlight=False, markup=False)


def notes(rows: list[Row], setting: Setting) -> list[str]:
    """What holds for this plan only."""
    found = []
    if any(row.activations is None for row in rows):
        found.append("Activations are not in it: the sizes of this model's layers are not known.")
    if unknown := {row.optimizer: None for row in rows if row.temporaries is None}:
        found.append(f"Temporaries of {', '.join(unknown)} are not in it: nobody has counted them.")
    if any(row.mode == "fused" for row in rows):
        found.append(
            "Micro-batches keep all gradients between them, fused or not: those of ordinary steps then come on top."
        )
    if setting.sharding == "ddp":
        found.append(
            "Communication: DDP's buckets (none with gradient_as_bucket_view=True); fused, gradients being averaged, "
            "with process_group= and no wrapper, whose buckets would be as large as all gradients."
        )
    return found


def unit_of(rows: list[Row]) -> tuple[str, int]:
    """Returns the unit of a table or a picture, and its bytes."""
    return ("GB", GB) if max(row.total for row in rows) >= GB else ("MB", 10**6)


def _figure(nbytes: int | None, unit: int) -> str:
    return ABSENT if nbytes is None else f"{nbytes / unit:,.3f}" if nbytes < 100 * unit else f"{nbytes / unit:,.1f}"


def as_json(model: Model, rows: list[Row], setting: Setting, gpu: int | None) -> str:
    """Returns the plan, in bytes."""
    params = [*model.module.parameters()]
    record: dict[str, Any] = {
        "model": model.name,
        "parameters": sum(param.numel() for param in params),
        "tensors": len(params),
        "sizes": model.sizes and asdict(model.sizes),
        "setting": {**asdict(setting), "dtype": str(setting.dtype).removeprefix("torch.")},
        "gpu_bytes": gpu,
        # what gradients of a fused backward pass are never more than, in whatever order they come
        "fused_gradients_bound": largest_two(param for param in params if param.requires_grad),
        "rows": [
            {**asdict(row), "total": row.total, "fits": None if gpu is None else row.total <= gpu} for row in rows
        ],
        "notes": [NOTE, *notes(rows, setting)],
        "recommendation": recommendation(model, rows, setting, gpu),
    }
    return json_of(record)
