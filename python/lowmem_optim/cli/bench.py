"""`lowmem bench`: times optimizer steps over a model's parameters, this package's against others'."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from lowmem_optim.cli.arguments import blaming, model_option, option, progress_bar
from lowmem_optim.cli.files import make_folder, make_place

if TYPE_CHECKING:
    from lowmem_optim.cli.bench_rows import Row, Workload
    from lowmem_optim.cli.contenders import Contender

WORK, PLACE, FILES = "What is timed", "Where and how long", "Files"
DEFAULT_MODEL = {"cpu": "llama-60m", "cuda": "llama-1b"}
DEFAULT_LAYERS = {"cpu": 1, "cuda": None}  # of the default model: that it takes a minute or two
DEFAULT_DTYPE: dict[str, Literal["fp32", "bf16"]] = {"cpu": "fp32", "cuda": "bf16"}
DEFAULT_ROUNDS = {"cpu": 10, "cuda": 30}


def bench_command(
    optimizer: Annotated[
        list[str] | None,
        option(
            WORK,
            "One of this package's, which brings along what one would use instead. Repeatable.",
            *("-o", "--optimizer"),
            metavar="NAME",
            default="all",
        ),
    ] = None,
    model: Annotated[str | None, model_option(WORK, DEFAULT_MODEL)] = None,
    layers: Annotated[
        int | None,
        option(
            WORK,
            "Only the first N layers.",
            metavar="N",
            default=f"all; without --model {DEFAULT_LAYERS['cpu']} on a CPU",
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        option(WORK, "Type of parameters and gradients.", default="fp32 on a CPU, bf16 on a GPU"),
    ] = None,
    device: Annotated[str, option(PLACE, "Where to run.", metavar="auto|cpu|cuda|cuda:N")] = "auto",
    rounds: Annotated[
        int | None,
        option(
            PLACE,
            "Steps of each that are timed.",
            min=1,
            default=f"{DEFAULT_ROUNDS['cpu']} on a CPU, {DEFAULT_ROUNDS['cuda']} on a GPU",
        ),
    ] = None,
    threads: Annotated[
        int, option(PLACE, "Threads of a CPU. With one, time in which others have the core does not count.", min=1)
    ] = 1,
    out: Annotated[
        Path | None,
        option(FILES, "Folder for MODEL-DTYPE.csv, with all figures and their circumstances.", default=False),
    ] = None,
    plot: Annotated[Path | None, option(FILES, "PNG file for a picture of rates and times.", default=False)] = None,
) -> None:
    """Time optimizer steps over the parameters of a real model, this package's against what one would use instead.

    All take turns in one run, from caches that were overwritten, beside a copy of as many bytes as the parameters have.
    """
    # here rather than above, so that `lowmem --help` need not wait for torch
    import torch

    from lowmem_kernels.testing.models import MODELS, model_shapes, parameter_count
    from lowmem_optim.cli import bench_plot, bench_rows, bench_table, contenders
    from lowmem_optim.cli.bench_rows import Workload
    from lowmem_optim.cli.loop import DTYPES, find_device
    from lowmem_optim.cli.record import environment

    with blaming("--device"):
        device = find_device(device)
    kind = device.partition(":")[0]
    if model is None and layers is None:
        layers = DEFAULT_LAYERS[kind]
    model, dtype, rounds = model or DEFAULT_MODEL[kind], dtype or DEFAULT_DTYPE[kind], rounds or DEFAULT_ROUNDS[kind]
    with blaming("--model"):
        whole = model_shapes(model)
    with blaming("--layers"):
        shapes = model_shapes(model, layers)
    with blaming("--optimizer"):
        own = contenders.ours(optimizer or [], DTYPES[dtype])
    with blaming("--out"):
        table = out and make_folder(out) / f"{model}-{dtype}.csv"
    with blaming("--plot"):
        if plot is not None:
            make_place(plot)

    torch.set_num_threads(threads)
    console = Console()
    rows = _run(Workload(shapes, DTYPES[dtype], torch.device(device), rounds), [*contenders.others(own), *own], console)

    count = parameter_count(shapes)
    around = environment(device)
    part = "" if len(shapes) == len(whole) else f", {layers} of {MODELS[model].layers} layers"
    title = f"{model}{part}: {count / 1e6:,.1f} M parameters in {len(shapes)} tensors, {dtype}, {around['device']}" + (
        f", {threads} thread{'s' * (threads > 1)}" if kind == "cpu" else ""
    )
    command = f"lowmem bench --model {model} --dtype {dtype} --device {device} --rounds {rounds} --threads {threads}"
    command += "" if layers is None else f" --layers {layers}"
    command += "".join(f" --optimizer {name}" for name in optimizer or [])
    bench_table.show(console, title, rows, count, device)
    if table is not None:
        circumstances = {"model": model, "layers": layers or MODELS[model].layers, "tensors": len(shapes)}
        circumstances |= {"parameters": count, "dtype": dtype, "rounds": rounds, **around, "command": command}
        bench_rows.write_csv(table, rows, count, circumstances)
    if plot is not None:
        bench_plot.draw(plot, rows, count, title)
    for path in (table, plot):
        if path is not None:
            console.print(path, soft_wrap=True, highlight=False)


def _run(work: "Workload", contenders: "list[Contender]", console: Console) -> "list[Row]":
    """The rows of all contenders, with a progress bar where there is a terminal."""
    import torch

    from lowmem_optim.cli import bench_rows

    with progress_bar(console) as progress:
        task = progress.add_task("", total=bench_rows.total_steps(contenders, work.rounds))
        try:
            return bench_rows.run(
                work, contenders, lambda doing, steps: progress.update(task, description=doing, advance=steps)
            )
        except torch.OutOfMemoryError as error:
            raise typer.BadParameter(
                "not enough memory: every contender has parameters and state of its own; "
                "use fewer --layers, a smaller --model or some --optimizer"
            ) from error
