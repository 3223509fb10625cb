"""What the commands share: options in panels of the help, errors that name an option, a bar, the sign for no figure."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: what tables show for a figure that is not there
ABSENT = "–"


def option(panel: str, help: str, *flags: str, default: str | bool = True, **settings: Any) -> Any:
    """An option in a panel of the help; `default` is what to show where the default is not a plain value."""
    return typer.Option(*flags, help=help, rich_help_panel=panel, show_default=default, **settings)


def model_option(panel: str, defaults: Mapping[str, str]) -> Any:
    """The option that names a model of `lowmem_kernels.testing.models`; `defaults` are those on "cpu" and on "cuda"."""
    return option(
        panel,
        "Whose parameters: gpt2, gpt2-xl, llama-60m, llama-350m, llama-1b, llama-7b, llama-3-8b, qwen3-8b, "
        "mixtral-8x7b.",
        metavar="NAME",
        default=f"{defaults['cpu']} on a CPU, {defaults['cuda']} on a GPU",
    )


@contextmanager
def blaming(flag: str | None) -> Iterator[None]:
    """Turns a ValueError into a usage error that names the option."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=flag and f"'{flag}'") from error


def progress_bar(console: Console) -> Progress:
    """What is being done, how much of how much, and since when; nothing where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
