"""The command line, `lowmem`. Commands import what they need when they run: `--help` waits for torch alone."""

from importlib.util import find_spec

if missing := [name for name in ("matplotlib", "rich", "typer") if find_spec(name) is None]:
    raise ModuleNotFoundError(f"the lowmem command needs {', '.join(missing)}: pip install 'lowmem-kernels[cli]'")

import typer

from lowmem_optim.cli.bench import bench_command
from lowmem_optim.cli.doctor import doctor_command
from lowmem_optim.cli.plan import plan_command
from lowmem_optim.cli.profile import profile_command
from lowmem_optim.cli.train import train_command

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",  # paragraphs of docstrings fill the lines of the terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan_command)
app.command("train")(train_command)
app.command("bench")(bench_command)
app.command("profile")(profile_command)
app.command("doctor")(doctor_command)


@app.callback()
def lowmem() -> None:
    """Low-memory optimizers for PyTorch."""


__all__ = ["app"]
