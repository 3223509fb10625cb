"""`lowmem train`: trains a small language model with several optimizers and compares them."""

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from lowmem_optim.cli.arguments import blaming, make_folder, option

if TYPE_CHECKING:
    from lowmem_optim.cli.data import Text
    from lowmem_optim.cli.loop import Run, TrainConfig
    from lowmem_optim.cli.registry import Choice

DEFAULT_OPTIMIZER = "adamw"
DEFAULT_COMPARISON = ("adalomo", "adafactor", "sinkgd")
ALL_DIVERGED = 1
PROCESS_FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


COMPARED, MODEL, TRAINING, PLACE = "Optimizers", "Model and text", "Training", "Device and files"


def train_command(
    optimizer: Annotated[
        str | None,
        option(
            COMPARED,
            "The baseline: a NAME of this package, or torch.NAME.",
            *("-o", "--optimizer"),
            default=DEFAULT_OPTIMIZER,
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        option(
            COMPARED,
            "Another optimizer to train. Repeatable.",
            *("-c", "--compare"),
            default=f"{', '.join(DEFAULT_COMPARISON)}, unless -o is given",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        option(COMPARED, "Peak learning rate of all.", min=0, default="each optimizer's own for this task"),
    ] = None,
    weight_decay: Annotated[
        float | None, option(COMPARED, "Weight decay of all.", min=0, default="each optimizer's own")
    ] = None,
    clip_grad_norm: Annotated[
        float, option(COMPARED, "Largest norm of all gradients together; 0 for no limit.", min=0)
    ] = 1.0,
    opt: Annotated[
        list[str] | None,
        option(COMPARED, "Argument for those that take it, as in betas=(0.9,0.95). Repeatable.", metavar="KEY=VALUE"),
    ] = None,
    fused_backward: Annotated[
        bool,
        option(
            COMPARED,
            "Update inside the backward pass, clipped by the running norm; of this package's optimizers only.",
            "--fused-backward",
        ),
    ] = False,
    backend: Annotated[
        Literal["auto", "triton", "torch"], option(COMPARED, "Implementation of this package's optimizers.")
    ] = "auto",
    layers: Annotated[int, option(MODEL, "Transformer layers.", min=1)] = 4,
    dim: Annotated[int, option(MODEL, "Width, a multiple of 32.", min=1)] = 128,
    context: Annotated[int, option(MODEL, "Bytes per sequence.", min=1)] = 128,
    dtype: Annotated[Literal["fp32", "bf16"], option(MODEL, "Type of the parameters.")] = "fp32",
    data: Annotated[
        Path | None,
        option(MODEL, "Text file, or folder of text files.", default="the Python standard library's source"),
    ] = None,
    steps: Annotated[int, option(TRAINING, "Steps per optimizer.", min=1)] = 600,
    batch_size: Annotated[int, option(TRAINING, "Sequences per step.", min=1)] = 8,
    warmup: Annotated[
        int | None,
        option(
            TRAINING,
            "Steps in which the learning rate rises; then a cosine lowers it to a tenth.",
            min=0,
            default="a twentieth of the steps",
        ),
    ] = None,
    eval_every: Annotated[int, option(TRAINING, "Steps from one validation to the next.", min=1)] = 100,
    eval_batches: Annotated[int, option(TRAINING, "Batches per validation.", min=1)] = 40,
    seed: Annotated[int, option(TRAINING, "Seed of the parameters and of the batches.", min=0)] = 0,
    device: Annotated[str, option(PLACE, "Where to train.", metavar="auto|cpu|cuda|cuda:N")] = "auto",
    nproc: Annotated[
        int,
        option(
            PLACE,
            "Processes that share each batch: a divisor of --batch-size. Each has a GPU of its own, or all the CPU.",
            min=1,
        ),
    ] = 1,
    sharding: Annotated[
        Literal["fsdp2", "ddp"] | None,
        option(PLACE, "What each of several processes has: shards of all, or a copy.", default="fsdp2"),
    ] = None,
    out: Annotated[
        Path | None,
        option(PLACE, "Folder for the table, the plot and the record.", default="runs/TIME-OPTIMIZERS"),
    ] = None,
) -> None:
    """Train a small language model with several optimizers, and compare loss, memory and time.

    Every optimizer starts from the same parameters and sees the same text in the same order.
    Ctrl-C stops training and keeps what was measured.
    """
    # here rather than above, so that `lowmem --help` need not wait for torch
    from lowmem_optim.cli import loop, registry
    from lowmem_optim.cli.data import load_text
    from lowmem_optim.cli.model import ModelConfig
    from lowmem_optim.cli.processes import Processes, RefusedError, check_processes, run_in

    if compare is None and optimizer is None:
        compare = [*DEFAULT_COMPARISON]
    with blaming("--optimizer"):
        choices = [registry.find(optimizer or DEFAULT_OPTIMIZER)]
    with blaming("--compare"):
        choices += [registry.find(name) for name in compare or []]
    with blaming("--opt"):
        options = registry.parse_options(opt or [], choices)
    for flag, key, value in (
        ("--weight-decay", "weight_decay", weight_decay),
        ("--backend", "backend", None if backend == "auto" else backend),
    ):
        if value is not None:
            with blaming(flag):
                registry.require_taker(key, choices)
            options[key] = value
    if fused_backward and not any(choice.can_fuse for choice in choices):
        names = " and ".join(choice.name for choice in choices)
        raise typer.BadParameter(f"{names} cannot; name one of this package", param_hint="'--fused-backward'")
    with blaming("--dim"):
        model = ModelConfig.from_width(layers, dim, context)
    if warmup is not None and warmup > steps:
        raise typer.BadParameter(f"{warmup} is more than --steps {steps}", param_hint="'--warmup'")
    with blaming("--device"):
        device = loop.find_device(device)
    with blaming("--nproc"):
        check_processes(nproc, batch_size, device)
    if sharding is not None and nproc == 1:
        raise typer.BadParameter(f"{sharding} with --nproc 1; allowed: several processes", param_hint="'--sharding'")
    if nproc > 1 and sharding != "ddp" and fused_backward and clip_grad_norm:
        raise typer.BadParameter(
            f"{clip_grad_norm:g} with --fused-backward and fsdp2; allowed: 0", param_hint="'--clip-grad-norm'"
        )
    with blaming("--data"):
        text = load_text(data, context)
    config = loop.TrainConfig(
        model=model,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup=steps // 20 if warmup is None else warmup,
        clip_grad_norm=clip_grad_norm,
        seed=seed,
        dtype=dtype,
        device=device,
        eval_every=eval_every,
        eval_batches=eval_batches,
        options=options,
        fused_backward=fused_backward,
    )
    with blaming(None):
        loop.rehearse(choices, config, text)
    with blaming("--out"):
        folder = make_folder(out or _default_folder(choices))

    console = Console()
    if nproc == 1:
        runs = _train_all(choices, config, text, console)
    else:
        config = replace(config, processes=Processes(nproc, sharding or "fsdp2"))
        try:
            runs = run_in(nproc, device, _train_with_others, choices, config, text)
        except RefusedError as error:
            raise typer.BadParameter(str(error), param_hint="'--sharding'") from error
        except RuntimeError as error:
            console.print(error, style="red", soft_wrap=True, highlight=False, markup=False)
            raise typer.Exit(PROCESS_FAILED) from error
    _report(runs, config, text, folder, console)
    if runs[-1].status == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if all(run.status == "diverged" for run in runs):
        raise typer.Exit(ALL_DIVERGED)


def _train_with_others(
    rank: int, check_in: Callable[[], None], choices: "list[Choice]", config: "TrainConfig", text: "Text"
) -> "list[Run]":
    """What each of several processes does. Only the first is heard."""
    from lowmem_optim.cli import loop
    from lowmem_optim.cli.processes import RefusedError, device_of

    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console() if rank == 0 else Console(file=nowhere)
        own = replace(config, device=device_of(config.device, rank))
        try:
            loop.rehearse(choices, own, text)
        except ValueError as error:  # of shards or copies, since the command's own rehearsal went well
            raise RefusedError(f"{config.processes.sharding} with {error}") from error
        return _train_all(choices, own, text, console, check_in)


def _train_all(
    choices: "list[Choice]",
    config: "TrainConfig",
    text: "Text",
    console: Console,
    check_in: Callable[[], None] = lambda: None,
) -> "list[Run]":
    """A run for each optimizer, up to the one that was interrupted; calls `check_in` after each step."""
    from lowmem_optim.cli import loop
    from lowmem_optim.cli.progress import Display

    console.print(_summary(config, text), highlight=False)
    runs: list[Run] = []
    with Display(console, config.steps) as display:

        def show(run: "Run") -> None:
            display.show(run)
            check_in()

        for choice in choices:
            run = loop.train(choice, config, text, show)
            runs.append(run)
            if run.status == "diverged":
                steps = len(run.training_loss)
                console.print(f"[red]{run.optimizer} diverged: its loss is not finite after {steps} steps[/]")
            if run.status == "interrupted":
                break
    return runs


def _report(runs: "list[Run]", config: "TrainConfig", text: "Text", folder: Path, console: Console) -> None:
    from lowmem_optim.cli.plot import draw
    from lowmem_optim.cli.record import write_record
    from lowmem_optim.cli.report import comparison, notes, write_markdown

    console.print(comparison(runs))
    for note in notes(config):
        console.print(note, highlight=False)
    table, plot, record = folder / "table.md", folder / "loss.png", folder / "record.json"
    write_markdown(table, runs, config)
    write_record(record, config, text, runs)
    draw(plot, runs, _summary(config, text))
    for path in (table, plot, record):
        console.print(path, soft_wrap=True, highlight=False)


def _summary(config: "TrainConfig", text: "Text") -> str:
    count, sharding = config.processes.count, config.processes.sharding
    where = config.device if count == 1 else f"{count} processes with {sharding}, {config.device}"
    return (
        f"{config.model.parameters / 1e6:.2f} M parameters ({config.dtype}, {where}), "
        f"{config.steps} steps of {config.tokens_per_step} bytes from {text.source}"
    )


def _default_folder(choices: "list[Choice]") -> Path:
    names = "-".join(choice.name.lower() for choice in choices)
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{names}"
