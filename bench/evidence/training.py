"""A short real training of 60M parameters in bfloat16 with several optimizers, with and without stochastic rounding.

`gpu_evidence.py` runs this. Each optimizer is a `lowmem train` of its own, on the same batches of torch's Python
sources from the same parameters, with as many steps as fit in the time. It writes training.json, training.csv,
curves.csv, training.md and training.png, and training/ with the record, table and plots of each `lowmem train`.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from running import Section, run_section
from training_plot import draw

from lowmem_optim.cli.files import make_folder, write_whole
from lowmem_optim.cli.record import environment


@dataclass(frozen=True)
class Recipe:
    """An optimizer with its learning rate and other arguments as `lowmem train` takes them, and where they are from."""

    optimizer: str
    lr: float
    source: str
    options: dict[str, Any] = field(default_factory=dict)


#: Not tuned for this task. Warm-up over a tenth, cosine to a tenth, no decay and no clipping are the papers' for 60M.
RECIPES = [
    Recipe("AdamW", 1e-3, "arXiv 2502.07752, table 8, for Llama 60M to 350M"),
    Recipe(
        *("Adafactor", 1e-3, "documentation of transformers.Adafactor, for training without relative steps"),
        {"scale_parameter": False, "relative_step": False},
    ),
    Recipe("AdaLomo", 0.05, "sweep on the default task of lowmem train; none is published for training from nothing"),
    Recipe("APOLLO", 0.01, "arXiv 2412.05270, for Llama 60M", {"rank": 128, "fallback_lr": None}),
    Recipe("APOLLOMini", 0.01, "arXiv 2412.05270, for Llama 60M"),
    Recipe("SinkGD", 0.02, "arXiv 2502.06742, as its ports have it; scale 0.05", {"scale": 0.05}),
    Recipe("AdaPM", 1e-3, "AdamW's, whose unit it has; its paper's was not found"),
]
#: 60.36 M parameters, nearly all in matrices of 512 and 1376, the widths of the papers' Llama 60M: ranks compare.
MODEL = {"layers": 19, "dim": 512, "context": 512, "batch-size": 32, "dtype": "bf16"}
DRY_MODEL = {**MODEL, "layers": 1, "dim": 32, "context": 16, "batch-size": 2}
#: Steps that are enough to go once over the 30 MB of text that `lowmem train` reads.
MOST_STEPS, LEAST_STEPS, DRY_STEPS = 1800, 20, 4
#: To find how long a step takes: steps, and how much longer than AdamW's with validations others may take on average.
TRIAL_STEPS, MARGIN = 12, 1.35
#: Seconds to end in after SIGTERM; with less than the others left, an optimizer is not begun.
GRACE, LEAST_SECONDS = 15.0, 10.0
ROUNDINGS = ("True", "False")
FIGURES = ("validation_loss", "validation_loss_bits", "tokens_per_second", "step_ms", "optimizer_ms", "peak_mib")


def corpus(folder: Path, root: Path) -> None:
    """Fill a folder with links to all Python files below another."""
    for file in root.rglob("*.py"):
        link = folder / file.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)


def train_command(
    recipe: Recipe, steps: int, model: dict[str, Any], text: Path, device: str, out: Path, trial: bool = False
) -> tuple[str, ...]:
    """Return the `lowmem train` of an optimizer, with both roundings unless it is a trial."""
    options: dict[str, Any] = {
        **model,
        **{"steps": steps, "warmup": steps // 10, "schedule": "cosine", "final-lr": 0.1, "lr": recipe.lr},
        **{"weight-decay": 0, "clip-grad-norm": 0, "seed": 0, "log-every": 50, "checkpoint-every": 0},
        **{"eval-every": max(1, steps // 10), "eval-batches": 10, "data": text, "device": device, "out": out},
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    words += [word for name, value in recipe.options.items() for word in ("--opt", f"{name}={value!r}")]
    words += [] if trial else ["--sweep", f"stochastic_rounding={','.join(ROUNDINGS)}"]
    return (sys.executable, "-c", "from lowmem_optim.cli import app; app()", "train", "-o", recipe.optimizer, *words)


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Return what a `lowmem train` has recorded of its runs; none where it did not come to that."""
    record = folder / "record.json"
    return json.loads(record.read_text(encoding="utf-8"))["runs"] if record.exists() else []


def keep(trained: Path, folder: Path) -> None:
    """Copy the files of a `lowmem train`, without its folders: checkpoints have the size of the model and more."""
    for path in trained.glob("*.*"):
        if path.is_file():
            shutil.copy(path, make_folder(folder))


def steps_in(seconds: float, overhead: float, step: float, optimizers: int) -> int:
    """Return how many steps all runs can take in so many seconds, if a process takes ``overhead`` beside its steps."""
    runs = len(ROUNDINGS) * optimizers
    steps = int((seconds - optimizers * overhead) / (runs * MARGIN * step))
    return max(LEAST_STEPS, min(MOST_STEPS, steps - steps % 10))


def row_of(recipe: Recipe, rounding: str, run: dict[str, Any] | None, why_not: str) -> dict[str, Any]:
    """Return a row of the table, with figures of None for a run that is not known."""
    figures = {} if run is None else run["figures"]
    return {
        "optimizer": recipe.optimizer,
        "stochastic_rounding": rounding,
        "lr": recipe.lr,
        "options": json.dumps(recipe.options),
        "source": recipe.source,
        "status": "failed" if run is None else run["status"],
        "reason": why_not if run is None or run["status"] == "interrupted" else "",
        "steps": None if run is None else len(run["training_loss"]),
        "tokens": None if run is None else len(run["training_loss"]) * run["tokens_per_step"],
        "parameters": None if run is None else run["parameters"],
        "state_bytes_per_parameter": figures.get("state_bytes_per_parameter"),
        **{name: figures.get(name) for name in FIGURES},
        "seconds": None if run is None else run["wall_seconds"],
    }


def rows_of(recipe: Recipe, runs: Sequence[dict[str, Any]], reason: str) -> list[dict[str, Any]]:
    """Return a row for each rounding."""
    known = {run["settings"]["stochastic_rounding"]: run for run in runs}
    return [row_of(recipe, rounding, known.get(rounding), reason) for rounding in ROUNDINGS]


def curve_of(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return validation losses of runs, a row for each."""
    return [
        {
            "optimizer": run["optimizer"],
            "stochastic_rounding": run["settings"]["stochastic_rounding"],
            "step": step,
            "tokens": step * run["tokens_per_step"],
            "validation_loss": loss,
        }
        for run in runs
        for step, loss in run["validation_loss"]
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table for readers."""
    columns = {
        **{"validation_loss": ("loss, nats/byte", ".4f"), "tokens_per_second": ("tokens/s", ",.0f")},
        **{"optimizer_ms": ("optimizer, ms", ".2f"), "step_ms": ("step, ms", ".1f"), "peak_mib": ("peak MiB", ",.0f")},
        "state_bytes_per_parameter": ("state, bytes/parameter", ".2f"),
    }
    names = " | ".join(name for name, _ in columns.values())
    lines = [f"| optimizer | rounding | lr | status | steps | {names} |", "|---" * (5 + len(columns)) + "|"]
    for row in rows:
        figures = ["" if row[key] is None else format(row[key], form) for key, (_, form) in columns.items()]
        status = row["status"] + (f": {row['reason'].replace('|', ' ')}" if row["reason"] else "")
        rounding = "stochastic" if row["stochastic_rounding"] == "True" else "to nearest"
        cells = (row["optimizer"], rounding, f"{row['lr']:g}", status, str(row["steps"] or ""), *figures)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(
    out: Path, rows: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]], circumstances: dict[str, Any]
) -> None:
    """Write all results so far."""
    record = {**circumstances, "rows": rows, "curves": curves}
    write_whole(out / "training.json", json.dumps(record, indent=1) + "\n")
    for name, lines in (("training.csv", rows), ("curves.csv", curves)):
        with (out / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    (out / "training.md").write_text(table(rows), encoding="utf-8")
    draw(out / "training.png", rows, curves, circumstances["title"])


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    steps: Annotated[int | None, typer.Option(help="Of each run, instead of as many as fit.", min=LEAST_STEPS)] = None,
    seconds: Annotated[float, typer.Option(help="For all runs together.", min=1)] = 505.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="A tiny model on a CPU, with one optimizer.")] = False,
) -> None:
    """Train with all optimizers, one after the other."""
    end = time.monotonic() + seconds
    folder, root = make_folder(out / "training"), Path(torch.__file__).parent
    recipes, model, device = RECIPES, MODEL, "cuda"
    if dry_run:
        os.environ["OMP_NUM_THREADS"] = "1"
        recipes, model, device, root, steps = RECIPES[2:3], DRY_MODEL, "cpu", root / "optim", DRY_STEPS
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        text, trained = Path(place) / "text", Path(place) / "trained"
        corpus(text, root)
        if steps is None:
            command = train_command(RECIPES[0], TRIAL_STEPS, model, text, device, trained / "trial", trial=True)
            trial = run_section(Section("trial", "a trial", command, 0), folder, seconds, inside=True, grace=GRACE)
            runs = read_runs(trained / "trial")
            if trial.status != "passed" or not runs:
                raise RuntimeError(
                    f"the trial with {RECIPES[0].optimizer} failed, {trial.reason}: see training/trial.log"
                )
            step = statistics.median(runs[0]["step_ms"]) / 1e3
            overhead = trial.seconds - TRIAL_STEPS * step
            steps = steps_in(end - time.monotonic(), overhead, step, len(recipes))
            print(f"{steps} steps: one takes {1e3 * step:.1f} ms, and a process {overhead:.1f} s more", flush=True)
        batch, context = int(model["batch-size"]), int(model["context"])
        title = f"{steps} steps of {batch * context} bytes of torch's Python sources, bf16"
        circumstances = {"title": title, "steps": steps, "model": model, "seconds": seconds, **environment(device)}
        for i, recipe in enumerate(recipes):
            left = end - time.monotonic() - GRACE
            if left < LEAST_SECONDS:
                rows += rows_of(recipe, [], f"no time left of {seconds:.0f} s")
                write(out, rows, curves, circumstances)
                continue
            command = train_command(recipe, steps, model, text, device, trained / recipe.optimizer)
            # half as much again as its share: those after it may need less than theirs
            limit = min(left, 1.5 * left / (len(recipes) - i))
            section = Section(recipe.optimizer, "training", command, limit)
            outcome = run_section(section, folder, limit, inside=True, grace=GRACE)
            keep(trained / recipe.optimizer, folder / recipe.optimizer)
            runs = read_runs(trained / recipe.optimizer)
            shutil.rmtree(trained / recipe.optimizer, ignore_errors=True)
            rows += rows_of(recipe, runs, outcome.reason or "no record")
            curves += curve_of(runs)
            print(f"{recipe.optimizer}: {outcome.status} in {outcome.seconds} s  {outcome.reason}", flush=True)
            write(out, rows, curves, circumstances)
    print(table(rows))
    # a run that diverges is a result
    if failed := [row["optimizer"] for row in rows if row["status"] in ("failed", "interrupted")]:
        raise RuntimeError(f"{', '.join(dict.fromkeys(failed))}: see training.md and the logs in training/")


if __name__ == "__main__":
    typer.run(main)
