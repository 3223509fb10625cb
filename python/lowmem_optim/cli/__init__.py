"""The command line, `lowmem`. Commands import torch and matplotlib when they run, so that `--help` is quick."""

import typer

from lowmem_optim.cli.train import train_command

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
app.command("train")(train_command)


@app.callback()
def lowmem() -> None:
    """Low-memory optimizers for PyTorch."""


__all__ = ["app"]
