"""`lowmem plan`: what a model takes with each optimizer, and what fits, before anything is allocated."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from lowmem_optim.cli.arguments import blaming, option
from lowmem_optim.cli.files import make_place

if TYPE_CHECKING:
    from lowmem_optim.cli.registry import Choice

OPTIMIZERS, TRAINING, PLACE, FILES = "Optimizers", "Training", "Devices", "Output"
#: What one would use instead of this package.
BASELINE = "torch.AdamW"


def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            help="llama-7b, llama-3-8b, qwen3-8b, mixtral-8x7b, gpt2, gpt2-xl, llama-60m, llama-350m or llama-1b; a "
            "config.json of transformers or a folder that has one; or module:callable, which returns a module.",
            metavar="MODEL",
            show_default=False,
        ),
    ],
    optimizer: Annotated[
        list[str] | None,
        option(
            OPTIMIZERS,
            "A NAME of this package, or torch.NAME. Repeatable.",
            *("-o", "--optimizer"),
            metavar="NAME",
            default=f"all of this package, and {BASELINE}",
        ),
    ] = None,
    opt: Annotated[
        list[str] | None,
        option(OPTIMIZERS, "Argument for those that take it, as in rank=128. Repeatable.", metavar="KEY=VALUE"),
    ] = None,
    roles: Annotated[
        bool, option(OPTIMIZERS, "Print what split_params says of each parameter, and nothing else.", "--roles")
    ] = False,
    dtype: Annotated[Literal["bf16", "fp32"], option(TRAINING, "Type of parameters and gradients.")] = "bf16",
    batch: Annotated[int, option(TRAINING, "Sequences of a step on each device.", min=1)] = 1,
    sequence: Annotated[int, option(TRAINING, "Tokens of a sequence.", min=1)] = 2048,
    checkpointing: Annotated[
        bool, option(TRAINING, "Keep only the inputs of layers, and compute the rest again.", "--checkpointing")
    ] = False,
    gpu: Annotated[
        str | None,
        option(PLACE, "Memory of a device, as in 24GB (1e9 bytes) or 80GiB (2^30).", metavar="SIZE", default=False),
    ] = None,
    ranks: Annotated[int, option(PLACE, "Devices.", min=1)] = 1,
    sharding: Annotated[
        Literal["none", "ddp", "fsdp2"] | None,
        option(PLACE, "The same model on all of them, or a part on each.", default="none; ddp with several ranks"),
    ] = None,
    plot: Annotated[Path | None, option(FILES, "PNG file for stacked bars.", default=False)] = None,
    json: Annotated[
        Path | None, option(FILES, "File for all figures in bytes; - prints them and nothing else.", default=False)
    ] = None,
) -> None:
    """Say what a model takes in memory with each optimizer, with ordinary steps and the update in the backward pass.

    Nothing is allocated and nothing fetched: the model and its optimizers are made on the meta device.
    """
    # here rather than above, so that `lowmem --help` need not wait for torch
    from lowmem_optim import split_params
    from lowmem_optim.cli import plan_advice, plan_plot, plan_report, registry
    from lowmem_optim.cli.loop import DTYPES
    from lowmem_optim.cli.plan_memory import Setting, plan
    from lowmem_optim.cli.plan_model import load_model

    sharding = sharding or ("none" if ranks == 1 else "ddp")
    if (sharding == "none") != (ranks == 1):
        allowed = "ddp or fsdp2 with several --ranks" if ranks > 1 else "none with one rank"
        raise typer.BadParameter(f"{sharding} with --ranks {ranks}; allowed: {allowed}", param_hint="'--sharding'")
    with blaming("--gpu"):
        memory = None if gpu is None else plan_report.size_of(gpu)
    with blaming("--optimizer"):
        choices = _choices(optimizer or [])
    with blaming("--opt"):
        options = registry.parse_options(opt or [], choices)
    to_stdout = str(json) == "-"
    for flag, path in (("--plot", plot), ("--json", None if to_stdout else json)):
        with blaming(flag):
            if path is not None:
                make_place(path)
    with blaming("MODEL"):
        found = load_model(model, DTYPES[dtype])
    console = Console()
    if roles:
        console.out(str(split_params(found.module)), highlight=False)
        return
    setting = Setting(DTYPES[dtype], batch, sequence, checkpointing, ranks, sharding)
    with blaming("--opt" if opt else "--optimizer"):
        rows = plan(found, choices, options, setting)
    title = plan_report.title_of(found, setting)
    if to_stdout:
        typer.echo(plan_report.as_json(found, rows, setting, memory), nl=False)
    else:
        plan_report.show(console, title, rows, setting, memory)
        advice = plan_advice.recommendation(found, rows, setting, memory)
        console.print(advice, style="bold", highlight=False, soft_wrap=True)
        best = None if memory is None else plan_advice.best_of(rows, memory)
        own = next((choice for choice in choices if best and choice.name == best.optimizer and choice.can_fuse), None)
        if best is not None and own is not None:
            taken = {key: value for key, value in options.items() if own.takes(key)}
            console.print(plan_advice.in_code(best, taken), highlight=False, markup=False, soft_wrap=True)
    if plot is not None:
        plan_plot.draw(plot, rows, title, memory)
    if json is not None and not to_stdout:
        json.write_text(plan_report.as_json(found, rows, setting, memory), encoding="utf-8")
    for path in (plot, json):
        if path is not None and not to_stdout:
            console.print(path, soft_wrap=True, highlight=False)


def _choices(names: list[str]) -> "list[Choice]":
    """Those of these names, each once; without names all of this package's and the baseline."""
    from lowmem_optim.cli import registry

    if not names:
        return [*(choice for choice in registry.choices().values() if choice.can_fuse), registry.find(BASELINE)]
    return [*{choice.name: choice for choice in map(registry.find, names)}.values()]
