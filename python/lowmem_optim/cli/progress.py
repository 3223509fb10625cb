"""Shows how training goes: a live bar on a terminal, and a line per evaluation anywhere else."""

import statistics
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowmem_optim.cli.run import Run

RECENT = 20  # steps whose median time gives the speed to show


class Display(Progress):
    """A context manager that shows the runs of a comparison; `show` takes a run after each of its steps."""

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.steps = steps
        self._shown: Run | None = None

    def show(self, run: Run) -> None:
        """Brings the display up to date with a run that has taken another step."""
        taken = run.steps_taken
        step_ms = statistics.median(run.step_ms[-RECENT:])
        figures = _figures(run, step_ms)
        if self.console.is_terminal:
            if self._shown is not run:
                self._shown, _ = run, self.add_task(run.label, total=self.steps, figures="")
            self.update(self.task_ids[-1], completed=taken, figures=figures)
        elif run.validation_loss and run.validation_loss[-1][0] == taken:
            left = timedelta(seconds=round((self.steps - taken) * step_ms / 1e3))
            line = f"{run.label}  step {taken}/{self.steps}  {figures}  {left} left"
            # a log in a file is read while it grows, and whoever is killed leaves what was printed
            print(line, file=self.console.file, flush=True)


def _figures(run: Run, step_ms: float) -> str:
    speed = f"{run.tokens_per_step / step_ms * 1e3:,.0f} tok/s {step_ms:.0f} ms"
    validation = f"{run.validation_loss[-1][1]:.3f}" if run.validation_loss else "  -  "
    return f"loss {run.training_loss[-1]:.3f} val {validation} {speed}"
