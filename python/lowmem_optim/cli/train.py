"""`lowmem train`: trains a small language model with several optimizers and compares them."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from lowmem_optim.cli.arguments import blaming, option

ALL_DIVERGED = FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

#: options that are not those of the training itself
NOT_KEPT = {"defaults", "out", "resume"}
#: options that may be others when a training goes on, since its losses do not depend on them but for rounding
WHERE = {"device", "nproc", "sharding"}
COMPARED, MODEL, TRAINING, PLACE = "Optimizers", "Model and text", "Training", "Device and files"


def train_command(
    command: typer.Context,
    optimizer: Annotated[
        str | None,
        option(
            COMPARED,
            "The baseline: a NAME of this package, or torch.NAME.",
            *("-o", "--optimizer"),
            default="adamw",
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        option(
            COMPARED,
            "Another optimizer to train. Repeatable.",
            *("-c", "--compare"),
            default="adalomo, adafactor, sinkgd, unless -o is given",
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
    sweep: Annotated[
        list[str] | None,
        option(
            COMPARED,
            "Train with each of several values, as in lr=1e-3,2e-3. Twice for all pairs of two arguments' values.",
            metavar="KEY=VALUE,VALUE",
        ),
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
    defaults: Annotated[
        bool,
        option(COMPARED, "Show what each optimizer starts from, and where that was found; then leave.", "--defaults"),
    ] = False,
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
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"],
        option(TRAINING, "Way of the learning rate after the warmup; wsd falls in the last fifth of the steps."),
    ] = "cosine",
    warmup: Annotated[
        int | None,
        option(
            TRAINING,
            "Steps in which the learning rate rises.",
            min=0,
            default="a twentieth of the steps",
        ),
    ] = None,
    final_lr: Annotated[
        float, option(TRAINING, "Where the schedule ends, as a fraction of the peak.", min=0, max=1)
    ] = 0.1,
    eval_every: Annotated[int, option(TRAINING, "Steps from one validation to the next.", min=1)] = 100,
    eval_batches: Annotated[int, option(TRAINING, "Batches per validation.", min=1)] = 40,
    log_every: Annotated[
        int, option(TRAINING, "Steps from one logged gradient norm and size of the update to the next.", min=1)
    ] = 10,
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
        option(PLACE, "New folder for checkpoints, logs, table, plot and record.", default="runs/TIME-OPTIMIZERS"),
    ] = None,
    checkpoint_every: Annotated[
        int, option(PLACE, "Steps from one checkpoint to the next; 0 for one at the end or where it stops.", min=0)
    ] = 50,
    resume: Annotated[
        Path | None,
        option(
            PLACE,
            "Go on where the training in this folder stopped. --device, --nproc and --sharding may be others.",
            metavar="FOLDER",
        ),
    ] = None,
) -> None:
    """Train a small language model with several optimizers, and compare loss, memory and time.

    Every optimizer starts from the same parameters and sees the same text in the same order. Ctrl-C stops after the
    step that is under way, and --resume goes on there; after a crash it goes on at the last checkpoint. Either way with
    the losses there would have been.
    """
    # here rather than above, so that `lowmem --help` need not wait for torch
    from lowmem_optim.cli import checkpoints, loop, settings, train_all
    from lowmem_optim.cli.files import alone_in
    from lowmem_optim.cli.processes import ALONE, ProcessFailedError, RefusedError

    console = Console()
    if defaults:
        _show_defaults(console)
        return
    arguments = {name: value for name, value in command.params.items() if name not in NOT_KEPT}
    if resume is not None:
        with blaming("--resume"):
            training = settings.read_settings(resume, _where_to_resume(command, resume))
        folder = resume
    else:
        training = settings.training_of(arguments)
        with blaming("--out"):
            folder = settings.new_folder(out, arguments, training.choices)
    console.print(train_all.summary(training), highlight=False, markup=False)
    with blaming(None):
        loop.rehearse(training.choices, replace(training.config, processes=ALONE), training.text)
    goes_on = f"lowmem train --resume {folder}  goes on"
    try:
        with ExitStack() as stack:
            with blaming("--out" if resume is None else "--resume"):
                stack.enter_context(alone_in(folder))
            if resume is None:
                settings.write_settings(folder, arguments, training)
            else:
                checkpoints.remove_partial(folder)
            runs = train_all.train_all(training, folder, console)
            train_all.report(runs, training, folder, console)
    except RefusedError as error:
        raise typer.BadParameter(str(error), param_hint="'--sharding'") from error
    except KeyboardInterrupt as error:  # a second one, where several processes were stopped at once
        console.print(goes_on, soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(INTERRUPTED) from error
    except (OSError, ProcessFailedError) as error:  # no space on the disk, say
        console.print(f"{error}\n{goes_on}", style="red", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(FAILED) from error
    if len(runs) < len(training.choices) or runs[-1].status == "interrupted":
        console.print(goes_on, soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(INTERRUPTED)
    if all(run.status == "diverged" for run in runs):
        raise typer.Exit(ALL_DIVERGED)


def _where_to_resume(command: typer.Context, folder: Path) -> dict[str, Any]:
    """Those of `WHERE` that were given, by name; raises ValueError for others, which the folder keeps."""
    sources = {name: command.get_parameter_source(name) for name in command.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    others = ", ".join(f"--{name.replace('_', '-')}" for name in command.params if name in given - WHERE - {"resume"})
    if others:
        raise ValueError(
            f"{folder} with {others}; allowed: --device, --nproc and --sharding; the folder keeps the others"
        )
    return {name: command.params[name] for name in given & WHERE}


def _show_defaults(console: Console) -> None:
    from lowmem_optim.cli import registry
    from lowmem_optim.cli.defaults import defaults_table

    console.print(defaults_table([(choice.name, choice.default) for choice in registry.choices().values()]))
