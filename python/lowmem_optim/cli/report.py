"""A comparison's figures, as a table on the terminal and in Markdown."""

import math
import statistics
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lowmem_optim.cli.arguments import ABSENT
from lowmem_optim.cli.files import write_whole
from lowmem_optim.cli.loop import TrainConfig
from lowmem_optim.cli.run import Run
from lowmem_optim.cli.sweep import Grid, sweep_table

MIB = 2**20

PEAK_NOTES = {
    "cpu": "growth of the process's peak resident memory from before the model was made: "
    "parameters, gradients, activations and optimizer state",
    "cuda": "peak of the device memory allocated to tensors, above that from before the model was made: "
    "parameters, gradients, activations and optimizer state",
}
TIME_NOTE = (
    "median over all steps; the optimizer's step includes gradient clipping, fused into it or not; "
    "where the update is fused into the backward pass, it is in the whole step only"
)
PROCESS_NOTES = {
    "fsdp2": "optimizer state and gradients are what all have together; peak memory and times are those of the first",
    "ddp": "optimizer state and gradients are what each has; peak memory and times are those of the first",
}

# figure, row label and number format, in the table's order
ROWS: list[tuple[str, str, Callable[[float], str]]] = [
    ("learning_rate", "peak learning rate", "{:g}".format),
    ("steps", "steps", "{:.0f}".format),
    ("validation_loss", "validation loss, nats/byte", "{:.4f}".format),
    ("validation_loss_bits", "validation loss, bits/byte", "{:.4f}".format),
    ("loss_above_baseline", "nats/byte above {baseline}", "{:+.4f}".format),
    ("state_mib", "optimizer state, MiB", "{:,.2f}".format),
    ("state_bytes_per_parameter", "optimizer state, bytes/parameter", "{:.3f}".format),
    ("gradient_mib", "gradients at a time, MiB", "{:,.2f}".format),
    ("peak_mib", "peak memory, MiB ¹", "{:,.1f}".format),
    ("optimizer_ms", "optimizer step, ms ²", "{:.2f}".format),
    ("step_ms", "whole step, ms ²", "{:.1f}".format),
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
]


def figures(run: Run, baseline: Run) -> dict[str, float | None]:
    """What a run comes to; None for what was not measured. Loss is in nats per byte unless the name says bits."""
    loss, above = run.final_loss, None
    if run is not baseline and run.status == baseline.status == "finished" and loss and baseline.final_loss:
        above = loss - baseline.final_loss
    step_ms = statistics.median(run.step_ms) if run.step_ms else None
    return {
        "learning_rate": run.lr,
        "steps": run.steps_taken,
        "validation_loss": loss,
        "validation_loss_bits": None if loss is None else loss / math.log(2),
        "loss_above_baseline": above,
        "state_mib": run.state_bytes / MIB,
        "state_bytes_per_parameter": run.state_bytes / run.parameters,
        "gradient_mib": run.gradient_bytes / MIB,
        "peak_mib": None if run.peak_bytes is None else run.peak_bytes / MIB,
        "optimizer_ms": statistics.median(run.optimizer_ms) if run.optimizer_ms else None,
        "step_ms": step_ms,
        "tokens_per_second": None if step_ms is None else run.tokens_per_step / step_ms * 1e3,
    }


def comparison(runs: list[Run], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """A table with a column per run; the first run is the baseline."""
    table = Table(box=style)
    table.add_column()
    for run in runs:
        notes = (["fused"] if run.fused else []) + ([] if run.status == "finished" else [run.status])
        table.add_column(run.label + "".join(f" ({note})" for note in notes), justify="right")
    columns = [figures(run, runs[0]) for run in runs]
    for name, label, form in ROWS:
        cells = [ABSENT if (value := column[name]) is None else form(value) for column in columns]
        if name != "loss_above_baseline" or len(runs) > 1:
            table.add_row(label.format(baseline=runs[0].label), *cells)
    return table


def notes(config: TrainConfig) -> list[str]:
    """What the table's footnotes say, which depends on the device and on the processes."""
    found = [f"¹ {PEAK_NOTES[config.device.partition(':')[0]]}", f"² {TIME_NOTE}"]
    count, sharding = config.processes.count, config.processes.sharding
    return found if count == 1 else [*found, f"{count} processes: {PROCESS_NOTES[sharding]}"]


def write_markdown(path: Path, runs: list[Run], config: TrainConfig, found: Sequence[Grid] = ()) -> None:
    """Writes what sweeps have found, and the comparison with its footnotes."""
    tables = [*(sweep_table(grid, box.MARKDOWN) for grid in found), comparison(runs, box.MARKDOWN)]
    parts = []
    for table in tables:
        console = Console(width=60 + 40 * len(table.columns), file=StringIO())  # wide enough that no cell wraps
        with console.capture() as capture:
            console.print(table)
        parts.append("\n".join(line.strip() for line in capture.get().strip().splitlines()))
    write_whole(path, "\n\n".join([*parts, *notes(config)]) + "\n")
