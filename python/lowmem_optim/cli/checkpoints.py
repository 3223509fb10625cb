"""Checkpoints of a run: folders `step-N`, each of which is complete or not there."""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from lowmem_optim.cli.files import rename, write_whole
from lowmem_optim.cli.processes import Processes
from lowmem_optim.cli.run import Run

RUN = "run.json"
PARTIAL = ".partial"


def save(folder: Path, run: Run, model: nn.Module, optimizer: Optimizer, processes: Processes) -> None:
    """Writes what is needed to go on after the run's last step, and removes what earlier steps left.

    All processes call it. A process that is killed meanwhile leaves the earlier checkpoint.
    """
    complete = folder / f"step-{run.steps_taken}"
    partial = folder / (complete.name + PARTIAL)
    with _plainly():
        dcp.save(_state(model, optimizer), checkpoint_id=partial, no_dist=processes.count == 1)
    if processes.rank == 0:
        write_whole(partial / RUN, json.dumps(asdict(run)))
        rename(partial, complete)
        for other in folder.glob("step-*"):
            if other != complete:
                shutil.rmtree(other)


def remove_partial(folder: Path) -> None:
    """Removes what a process that ended meanwhile left half done, in the folders of all runs."""
    for partial in folder.glob(f"*/step-*{PARTIAL}"):
        shutil.rmtree(partial)


def latest(folder: Path) -> Path | None:
    """The last complete checkpoint; None if there is none."""
    complete = [path for path in folder.glob("step-*") if not path.name.endswith(PARTIAL)]
    return max(complete, key=steps_of, default=None)


def steps_of(checkpoint: Path) -> int:
    """How many steps had been taken when the checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def read_run(checkpoint: Path) -> Run:
    """The run as it was when the checkpoint was written."""
    values = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
    pairs = {key: [(step, value) for step, value in values[key]] for key in Run.EVERY_SOME_STEPS}
    return Run(**(values | pairs))


def load(checkpoint: Path, model: nn.Module, optimizer: Optimizer, processes: Processes) -> None:
    """Brings a model and its optimizer to where they were, in as many processes as one likes."""
    state = _state(model, optimizer)
    with _plainly():
        dcp.load(state, checkpoint_id=checkpoint, no_dist=processes.count == 1)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


@contextmanager
def _plainly() -> Iterator[None]:
    """Without the warning that there is one process, and with what was raised, which torch wraps, Ctrl-C too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
