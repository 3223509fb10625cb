"""`lowmem profile`: steps of an optimizer, or calls of a verb, in named ranges for Nsight or torch.profiler."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import track

from lowmem_optim.cli.arguments import blaming, model_option, option
from lowmem_optim.cli.files import make_folder

if TYPE_CHECKING:
    import torch

    from lowmem_kernels.testing.models import Shapes
    from lowmem_optim.cli.profile_work import Work

WORK, PLACE, FILES = "What runs", "Where and how long", "Files"
DEFAULT_OPTIMIZER = "adalomo"
DEFAULT_MODEL, DEFAULT_LAYERS = {"cpu": "llama-60m", "cuda": "llama-7b"}, 1
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_bytes.sum")
NCU = (
    *("ncu", "--profile-from-start", "off", "--nvtx", "--metrics", ",".join(METRICS)),
    # the caches stay as the kernel before left them, clocks are the device's own, and units are bytes
    *("--cache-control", "none", "--clock-control", "none", "--print-units", "base"),
    *("--page", "raw", "--csv", "--log-file", "ncu.csv"),
)
NSYS = (
    *("nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop"),
    *("--trace=cuda,nvtx", "--output=profile"),
)
NSYS_STATS = ("nsys", "stats", "--report", "cuda_gpu_kern_sum,nvtx_gpu_proj_sum", "profile.nsys-rep")
ROWS = 15  # of the table of torch.profiler


def profile_command(
    optimizer: Annotated[
        str | None,
        option(
            WORK,
            "Whose step: a NAME of this package, or torch.NAME.",
            *("-o", "--optimizer"),
            metavar="NAME",
            default=DEFAULT_OPTIMIZER,
        ),
    ] = None,
    verb: Annotated[
        str | None,
        option(WORK, "A single verb instead of an optimizer, as in 'came' or 'adafactor, momentum'.", default=False),
    ] = None,
    model: Annotated[str | None, model_option(WORK, DEFAULT_MODEL)] = None,
    layers: Annotated[
        int | None,
        option(WORK, "Only the first N layers.", metavar="N", default=f"all; without --model {DEFAULT_LAYERS}"),
    ] = None,
    shape: Annotated[
        list[str] | None,
        option(WORK, "A parameter instead of a model's, as in 4096x11008. Repeatable.", metavar="ROWSxCOLUMNS"),
    ] = None,
    dtype: Annotated[Literal["fp32", "bf16"], option(WORK, "Type of parameters and gradients.")] = "bf16",
    device: Annotated[str, option(PLACE, "Where to run.", metavar="auto|cpu|cuda|cuda:N")] = "auto",
    warmup: Annotated[int, option(PLACE, "Steps before those that are profiled: they compile kernels.", min=1)] = 3,
    steps: Annotated[int, option(PLACE, "Steps that are profiled.", min=1)] = 5,
    torch_profiler: Annotated[
        bool, option(PLACE, "Profile with torch.profiler on a GPU too, and print its table.", "--torch-profiler")
    ] = False,
    formula: Annotated[
        Path | None,
        option(FILES, "JSON file for the bytes of each range by formula, for bench/nsight.", default=False),
    ] = None,
) -> None:
    """Run steps in named ranges, for Nsight Compute and Nsight Systems on a GPU or torch.profiler anywhere.

    Prints the commands that run this under ncu and nsys; only the steps after the warm-up are captured. On a CPU
    torch.profiler profiles at once.
    """
    # here rather than above, so that `lowmem --help` need not wait for torch

    from lowmem_optim.cli import profile_work
    from lowmem_optim.cli.loop import DTYPES, find_device

    if optimizer is not None and verb is not None:
        raise typer.BadParameter(f"--optimizer {optimizer} and --verb {verb}: only one of them", param_hint="'--verb'")
    if shape and (model is not None or layers is not None):
        raise typer.BadParameter("takes the place of --model and --layers", param_hint="'--shape'")
    with blaming("--device"):
        device = find_device(device)
    if model is None and layers is None:
        layers = DEFAULT_LAYERS
    model = model or DEFAULT_MODEL[device.partition(":")[0]]
    with blaming("--shape" if shape else "--layers" if layers else "--model"):
        shapes = profile_work.shapes_of(shape or [], model, layers)
    with blaming("--verb" if verb else "--optimizer"):
        work = _prepare(optimizer or DEFAULT_OPTIMIZER, verb, shapes, DTYPES[dtype], device)
    with blaming("--formula"):
        if formula is not None:
            make_folder(formula.parent)

    console = Console()
    command = _command(optimizer or DEFAULT_OPTIMIZER, verb, model, layers, shape or [], dtype, device, warmup, steps)
    for _ in track(range(warmup), description="warm-up", console=console, disable=not console.is_terminal):
        work.run()
    on_gpu = device.startswith("cuda")
    with _table(console, on_gpu) if torch_profiler or not on_gpu else _nsight() as enter:
        names = profile_work.run(work, steps, enter)
    console.print(f"{steps} steps of {work.title} on {device}, in ranges named", highlight=False)
    for name in names:
        console.print(f"  {name}", soft_wrap=True, highlight=False)
    where = "On this machine" if on_gpu else "On a machine with a GPU"
    console.print(f"\n{where}, bytes of each kernel by Nsight Compute, and the time line by Nsight Systems:\n")
    for line in ((*NCU, *command), (*NSYS, *command), NSYS_STATS):
        console.print(shlex.join(line), soft_wrap=True, highlight=False, markup=False)
    if formula is not None:
        profile_work.write_formula(formula, work, names, steps)
        console.print(f"\n{formula}", soft_wrap=True, highlight=False)


def _prepare(optimizer: str, verb: str | None, shapes: "Shapes", dtype: "torch.dtype", device: str) -> "Work":
    from lowmem_optim.cli import profile_work

    if verb is not None:
        return profile_work.of_verb(verb, shapes, dtype, device)
    return profile_work.of_optimizer(optimizer, shapes, dtype, device)


def _command(
    optimizer: str,
    verb: str | None,
    model: str,
    layers: int | None,
    shape: list[str],
    dtype: str,
    device: str,
    warmup: int,
    steps: int,
) -> list[str]:
    """This command again, for a GPU."""
    work = ["--optimizer", optimizer] if verb is None else ["--verb", verb]
    if shape:
        work += [part for text in shape for part in ("--shape", text)]
    else:
        work += ["--model", model, *([] if layers is None else ["--layers", str(layers)])]
    place = device if device.startswith("cuda") else "cuda"
    return [
        *("lowmem", "profile", *work, "--dtype", dtype, "--device", place),
        *("--warmup", str(warmup), "--steps", str(steps)),
    ]


@contextmanager
def _nsight() -> Iterator[Callable[[str], AbstractContextManager[Any]]]:
    """Between cudaProfilerStart and cudaProfilerStop, with NVTX ranges."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield torch.cuda.nvtx.range
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()


@contextmanager
def _table(console: Console, on_gpu: bool) -> Iterator[Callable[[str], AbstractContextManager[Any]]]:
    """Within torch.profiler, whose table is printed in the end."""
    import torch

    with torch.profiler.profile() as profiler:
        yield torch.profiler.record_function
    sort_by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    text = profiler.key_averages().table(sort_by=sort_by, row_limit=ROWS, max_name_column_width=60)
    console.print(text, soft_wrap=True, highlight=False, markup=False)
