"""Trains with all optimizers in turn, in one process or in several, and reports on them."""

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lowmem_optim.cli import checkpoints, loop, sweep
from lowmem_optim.cli.files import make_folder
from lowmem_optim.cli.plot import draw
from lowmem_optim.cli.processes import RefusedError, device_of, hearing, run_in
from lowmem_optim.cli.progress import Display
from lowmem_optim.cli.record import write_record
from lowmem_optim.cli.report import comparison, notes, write_markdown
from lowmem_optim.cli.run import Run
from lowmem_optim.cli.settings import Training


def train_all(training: Training, folder: Path, console: Console) -> list[Run]:
    """A run for each optimizer, up to the one that was interrupted.

    Raises RefusedError for what the others refuse, and ProcessFailedError where one has failed.
    """
    processes = training.config.processes
    if processes.count > 1:
        return run_in(processes.count, training.config.device, _train_with_others, training, folder)
    interrupted = threading.Event()
    with hearing(interrupted):
        return _train_all(training, folder, console, interrupted.is_set)


def _train_with_others(rank: int, asked_to_stop: Callable[[], bool], training: Training, folder: Path) -> list[Run]:
    """What each of several processes does. Only the first is heard."""
    with nullcontext() if rank == 0 else open(os.devnull, "w", encoding="utf-8") as file:
        own = replace(training, config=replace(training.config, device=device_of(training.config.device, rank)))
        try:
            loop.rehearse(own.choices, own.config, own.text)
        except ValueError as error:  # of shards or copies, since the command's own rehearsal went well
            raise RefusedError(f"{own.config.processes.sharding} with {error}") from error
        return _train_all(own, folder, Console(file=file), asked_to_stop)


def _train_all(training: Training, folder: Path, console: Console, asked_to_stop: Callable[[], bool]) -> list[Run]:
    config = training.config
    runs: list[Run] = []
    with Display(console, config.steps) as display:
        for choice in training.choices:
            own = make_folder(folder / choice.label.replace(" ", "-").replace("/", "-"))
            if checkpoint := checkpoints.latest(own):
                done = checkpoints.steps_of(checkpoint)
                console.print(f"{choice.label}  {done} of {config.steps} steps are done", highlight=False, markup=False)
            run = loop.train(choice, config, training.text, display.show, asked_to_stop, own)
            runs.append(run)
            if run.status == "diverged":
                console.print(f"[red]{run.label} diverged: its loss is not finite after {run.steps_taken} steps[/]")
            if run.status == "interrupted" or (choice is not training.choices[-1] and asked_to_stop()):
                break
    return runs


def report(runs: list[Run], training: Training, folder: Path, console: Console) -> None:
    """Prints and writes what the runs have come to; of a sweep, all of it and then the best of each optimizer."""
    found = sweep.grids(runs) if runs[0].settings else []
    best = sweep.best_of_each(runs)
    for grid in found:
        console.print(sweep.sweep_table(grid))
    console.print(comparison(best))
    for note in notes(training.config):
        console.print(note, highlight=False)
    paths = {name: folder / name for name in ("table.md", "loss.png", "record.json")}
    write_markdown(paths["table.md"], best, training.config, found)
    write_record(paths["record.json"], training.config, training.text, runs)
    draw(paths["loss.png"], best, summary(training))
    if found:
        paths["sweep.png"] = folder / "sweep.png"
        sweep.draw_sweep(paths["sweep.png"], found)
    for path in paths.values():
        console.print(path, soft_wrap=True, highlight=False)
    every = f"every step: {folder}/*/steps.csv, and tensorboard --logdir {folder}"
    console.print(every, soft_wrap=True, highlight=False, markup=False)


def summary(training: Training) -> str:
    """A line: the model, where it is trained, and on what."""
    config, text = training.config, training.text
    count, sharding = config.processes.count, config.processes.sharding
    where = config.device if count == 1 else f"{count} processes with {sharding}, {config.device}"
    return (
        f"{config.model.parameters / 1e6:.2f} M parameters ({config.dtype}, {where}), "
        f"{config.steps} steps of {config.tokens_per_step} bytes from {text.source}"
    )
