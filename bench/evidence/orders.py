"""One launch with tickets against one for each phase, and other orders of tickets, over real models' parameters.

`gpu_evidence.py` runs this. It writes orders.csv and orders.md. Bits are the same in all of them (tests/gpu).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sizes import DEVICES, TINY, shapes_of

from lowmem_kernels.device import device_facts
from lowmem_kernels.factored import launch as factored
from lowmem_kernels.multinorm import launch as multinorm
from lowmem_kernels.projection import launch as projection
from lowmem_kernels.testing.models import Shapes, parameter_count
from lowmem_kernels.tickets import Order, plan_order
from lowmem_optim.cli.contenders import make_tensors, ours, parameters
from lowmem_optim.cli.timing import Step, Stopwatch, count_launches, interleaved

OPTIMIZERS = ["AdaLomo", "TorchAdafactor", "CAME", "SinkGD", "APOLLOMini"]
#: Each looks the plan up by name in every call.
LAUNCHERS = (factored, multinorm, projection)
#: Models, and how many of their layers: all of GPT-2, of Llama 7B those that have 25 times the cache.
MODELS: dict[str, int | None] = {"gpt2": None, "llama-7b": 6}
PLANNED = "planned"


def orders(planned: Order) -> dict[str, Order]:
    """Return what is compared with the order that is planned for a device, each different in one thing."""
    return {
        PLANNED: planned,
        "phased": replace(planned, ahead=0, phased=True),
        "phased, all together": replace(planned, bundle_bytes=1 << 62, ahead=0, phased=True),
        "forward": replace(planned, reverse=False),
        "ahead 0": replace(planned, ahead=0),
        "ahead doubled": replace(planned, ahead=2 * planned.ahead),
        "bundle halved": replace(planned, bundle_bytes=planned.bundle_bytes // 2),
        "bundle doubled": replace(planned, bundle_bytes=2 * planned.bundle_bytes),
        "all together": replace(planned, bundle_bytes=1 << 62),
    }


def step_in(order: Order, step: Step) -> Step:
    """Return a step whose tickets follow in an order."""

    def ordered() -> None:
        for launcher in LAUNCHERS:
            launcher.plan_order = lambda facts: order
        step()

    return ordered


def measure(model: str, shapes: Shapes, names: list[str], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each optimizer and order; parameters and states are shared, so only orders differ."""
    values, grads = make_tensors(shapes, torch.bfloat16, device)
    planned = plan_order(device_facts(device))
    chosen = [contender for contender in ours(names, torch.bfloat16) if "nearest" not in contender.name]
    rows = []
    for contender in chosen:
        optimizer = contender.make(parameters(values, grads))
        steps = {name: step_in(order, optimizer.step) for name, order in orders(planned).items()}
        times = interleaved(steps, rounds, Stopwatch(device), lambda _: None)
        assert contender.moved is not None
        least = contender.moved.least(shapes, torch.bfloat16.itemsize)
        medians = {name: float(np.median([time.step for time in values])) for name, values in times.items()}
        for name, order in orders(planned).items():
            low, high = np.percentile([1e3 * time.step for time in times[name]], (20, 80))
            hosts = [time.host for time in times[name] if time.host is not None]
            rows.append(
                {
                    "model": model,
                    "tensors": len(shapes),
                    "parameters": parameter_count(shapes),
                    "optimizer": contender.name,
                    "order": name,
                    **vars(order),
                    "launches": count_launches(steps[name], device),
                    "ms_20": low,
                    "ms_50": 1e3 * medians[name],
                    "ms_80": high,
                    "host_us": 1e6 * float(np.median(hosts)) if hosts else None,
                    "gb_per_s": least / medians[name] / 1e9,
                    "times_faster_than_phased": medians["phased"] / medians[name],
                    "times_faster_than_planned": medians[PLANNED] / medians[name],
                }
            )
    for launcher in LAUNCHERS:
        launcher.plan_order = plan_order
    return rows


def table(rows: list[Mapping[str, Any]]) -> str:
    """Return milliseconds by model and optimizer, a column for each order."""
    names = list(dict.fromkeys(row["order"] for row in rows))
    lines = ["| ms, median | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for model, optimizer in dict.fromkeys((row["model"], row["optimizer"]) for row in rows):
        found = {row["order"]: row["ms_50"] for row in rows if (row["model"], row["optimizer"]) == (model, optimizer)}
        lines.append(f"| {model}, {optimizer} | " + " | ".join(f"{found[name]:.3f}" for name in names) + " |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="A tiny model on a CPU, where orders do nothing.")] = False,
) -> None:
    """Time steps in several orders of tickets."""
    torch.set_num_threads(1)
    rows: list[Mapping[str, Any]] = []
    models, names = ({TINY: None}, OPTIMIZERS[:1]) if dry_run else (MODELS, OPTIMIZERS)
    for model, layers in models.items():
        rows += measure(model, shapes_of(model, layers), names, DEVICES[dry_run], rounds=2 if dry_run else 30)
        # after each model, in case that the next one does not fit
        with (out / "orders.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (out / "orders.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
