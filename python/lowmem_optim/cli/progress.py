"""Shows how training goes: a live bar on a terminal, and a line per evaluation anywhere else."""

import statistics
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowmem_optim.cli.loop import Run

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

    def show(self, run: Run) -> None:
        """Brings the display up to date with a run that has taken another step."""
        taken = len(run.training_loss)
        step_ms = statistics.median(run.step_ms[-RECENT:])
        figures = _figures(run, step_ms)
        if self.console.is_terminal:
            task = self.task_ids[-1] if taken > 1 else self.add_task(run.optimizer, total=self.steps, figures="")
            self.update(task, completed=taken, figures=figures)
        elif run.validation_loss and run.validation_loss[-1][0] == taken:
            left = timedelta(seconds=round((self.steps - taken) * step_ms / 1e3))
            print(f"{run.optimizer}  step {taken}/{self.steps}  {figures}  {left} left", file=self.console.file)


def _figures(run: Run, step_ms: float) -> str:
    speed = f"{run.tokens_per_step / step_ms * 1e3:,.0f} tok/s {step_ms:.0f} ms"
    validation = f"{run.validation_loss[-1][1]:.3f}" if run.validation_loss else "  -  "
    return f"loss {run.training_loss[-1]:.3f} val {validation} {speed}"
