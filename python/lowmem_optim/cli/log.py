"""Figures of every step, as they come: a CSV file to read anywhere, and TensorBoard's."""

import csv
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from lowmem_optim.cli.run import Run

#: columns of the CSV after the step, and what TensorBoard calls them
NAMES = {
    "training_loss": "loss/training",
    "validation_loss": "loss/validation",
    "lr": "lr",
    "grad_norm": "norms/gradient",
    "update_rms": "norms/update_rms",
    "step_ms": "time/step_ms",
    "optimizer_ms": "time/optimizer_ms",
}
CSV = "steps.csv"


class Log:
    """Writes `steps.csv` and TensorBoard's events into a run's folder; `show` takes a run after each of its steps.

    Where tensorboard is not installed there are no events.
    What a run has behind it when it goes on is written anew: nothing of steps that are taken again stays.
    """

    def __init__(self, folder: Path, run: Run, rates: list[float]) -> None:
        self._rates = rates
        self._stream = (folder / CSV).open("w", newline="", encoding="utf-8")
        self._table = csv.DictWriter(self._stream, ["step", *NAMES])
        self._table.writeheader()
        self._events = None
        if find_spec("tensorboard") is not None:
            # here rather than above: it takes a while
            from torch.utils.tensorboard import SummaryWriter

            # what earlier files say of steps from the first on is forgotten
            self._events = SummaryWriter(str(folder), purge_step=1)
        some = {name: dict(getattr(run, name)) for name in Run.EVERY_SOME_STEPS}
        for step in range(1, run.steps_taken + 1):
            self._write(run, step, some)

    def show(self, run: Run) -> None:
        """Writes the last step."""
        some = {name: dict(getattr(run, name)[-1:]) for name in Run.EVERY_SOME_STEPS}
        self._write(run, run.steps_taken, some)
        self._stream.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if self._events is not None:
            self._events.close()

    def _write(self, run: Run, step: int, some: dict[str, dict[int, float]]) -> None:
        row: dict[str, float] = {"lr": self._rates[step - 1]}
        row |= {name: getattr(run, name)[step - 1] for name in ("training_loss", "step_ms", "optimizer_ms")}
        row |= {name: values[step] for name, values in some.items() if step in values}
        self._table.writerow({"step": step} | row)
        if self._events is not None:
            for name, value in row.items():
                self._events.add_scalar(NAMES[name], value, step)
