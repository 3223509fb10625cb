"""What can be known of the kernels without a GPU: their machine code, and their bytes in the interpreter.

    python bench/static_report.py      # or `make report`

Compiles every case of `compile_cases()` for every target, runs every verb in Triton's interpreter, and writes report.md
and report.json. The same versions of Torch and Triton write the same files again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from static_markdown import render
from torch import Tensor

from lowmem_kernels.testing import compile_cases

FOLDER = Path(__file__).parent / "static_report"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# three blocks of 16 rows, with the columns of LLaMA-7B's matrices; the wider ones for a verb of each kind
SHAPE, WIDE_SHAPE = (48, 4096), (48, 11008)
WIDE_VERBS = ("scaled_update", "adafactor, RMS(p) carried", "came")
# of the cache in which verbs are replayed, against one matrix of gradients: LLaMA-7B's 90 MB have 50 MB on an H100
CACHE_OF_MATRIX = 0.5
# all that a verb keeps for each element
ELEMENTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")
FACTORS = ("rows", "cols", "res_rows", "res_cols")

CURVE_SHAPE, CURVE_DTYPE = (128, 4096), "bf16"
CURVE_VERBS = ("adafactor, RMS(p) carried", "adafactor, RMS(p) read", "came")
CURVE_SIZES = (0.25, 0.5, 0.75, 1.0, 1.5, 3.0)
ORDERS = ("forward", "reverse")
# bytes of a line of a cache, and float32 numbers of the memory that verbs may allocate
LINE = 128
ARENA = 1 << 22
# share of a phase's programs that take turns
IN_FLIGHT = {"one": 0.0, "half": 0.5, "all": 1.0}

Task = tuple[Callable[..., Any], tuple[Any, ...]]


def kernel_facts(target: str, number: int) -> dict[str, Any]:
    """Compile one case for a target and return what its machine code says."""
    from lowmem_kernels.testing.aot import TARGETS, compile_case, inspect_kernel
    from lowmem_kernels.testing.loops import tile_loops

    case = compile_cases(TARGETS[target].warp_size)[number]
    compiled = compile_case(case, target)
    report = inspect_kernel(compiled, target)
    loops = tile_loops(case, compiled, target)
    widths = {kind: sorted({bits for loop in loops for bits in getattr(loop, kind)}) for kind in ("loads", "stores")}
    return {
        "case": case.name,
        "target": target,
        "warps": case.options["num_warps"],
        "registers": report.registers,
        "stack_bytes": report.stack_bytes,
        "spills": report.spills,
        "shared_bytes": report.shared_bytes,
        "programs": report.programs,
        "occupancy": report.occupancy,
        "instructions": report.instructions,
        "bulk_load_bits": [min(widths["loads"]), max(widths["loads"])],
        "bulk_store_bits": [min(widths["stores"]), max(widths["stores"])] if widths["stores"] else None,
        "loops": [
            {
                "name": loop.name,
                "instructions": loop.instructions,
                "elements": loop.elements,
                "per_element": round(loop.instructions_per_element, 1),
            }
            for loop in sorted(loops, key=lambda loop: loop.name)
        ],
    }


def verb_bytes(verb: str, shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    """Run a verb in the interpreter and return its bytes for each element, requested and at DRAM."""
    from lowmem_kernels.testing.bytecount import dram_bytes

    call, traffic = _traffic(verb, shape, dtype)
    numel = shape[0] * shape[1]
    asked = traffic.read + traffic.written + traffic.atomic
    read, written = dram_bytes(_without_tables(traffic), int(CACHE_OF_MATRIX * numel * DTYPES[dtype].itemsize))

    def share(nbytes: Any, names: Iterable[str]) -> float:
        return sum(nbytes[name] for name in names) / numel

    return {
        "verb": verb,
        "shape": list(shape),
        "dtype": dtype,
        "formula": {"read": call.formula[0] / numel, "written": call.formula[1] / numel},
        "requested": {"read": share(traffic.read, ELEMENTS), "written": share(traffic.written, ELEMENTS)},
        "requested_factors": round(share(asked, FACTORS), 2),
        "requested_rest": round(share(asked, asked.keys() - {*ELEMENTS, *FACTORS}), 2),
        "dram_formula": call.least / numel,
        "dram": round(share(read + written, ELEMENTS), 1),
        "dram_rest": round(share(read + written, (read + written).keys() - {*ELEMENTS}), 1),
    }


def cache_curve(verb: str, order: str) -> list[dict[str, Any]]:
    """Run a factored verb in the interpreter and return its DRAM bytes for each element against the cache's size."""
    from lowmem_kernels.testing.bytecount import dram_bytes

    with _phases(reverse=order == "reverse"):
        _, traffic = _traffic(verb, CURVE_SHAPE, CURVE_DTYPE)
    numel = CURVE_SHAPE[0] * CURVE_SHAPE[1]
    curves = []
    for name, share in IN_FLIGHT.items():
        trace = list(in_turns(_without_tables(traffic), share))
        totals = []
        for size in CURVE_SIZES:
            read, written = dram_bytes(trace, int(size * numel * DTYPES[CURVE_DTYPE].itemsize))
            totals.append(round(sum((read + written)[tensor] for tensor in ELEMENTS) / numel, 1))
        curves.append({"verb": verb, "order": order, "in_flight": name, "dram": totals})
    return curves


def _traffic(verb: str, shape: tuple[int, int], dtype: str) -> tuple[Any, Any]:
    """A verb's call and what it requests of its tensors and, as "scratch", of the memory that it allocates.

    All of it starts at multiples of a line, so that the lines touched do not depend on what the allocator gives.
    """
    from lowmem_kernels.testing import interpreter
    from lowmem_kernels.testing.bytecount import count_bytes
    from lowmem_kernels.testing.verbs import make_call

    torch.set_num_threads(1)
    interpreter.install_fast_calls()
    interpreter.install_fp32_arguments()
    interpreter.install_round_to_nearest()
    call = make_call(verb, [shape], DTYPES[dtype], backend="triton")
    tensors: dict[str, list[Tensor]] = {}
    for name, group in call.tensors.items():
        group[:] = [t if t is None else _aligned(t.numel(), t.dtype).view(t.shape).copy_(t) for t in group]
        tensors[name] = [t for t in group if t is not None]
    arena = _aligned(ARENA, torch.float32)
    taken = 0

    def empty(size: int, **_: Any) -> Tensor:
        nonlocal taken
        start, taken = taken, taken + -(-size // LINE) * LINE
        return arena[start : start + size]

    original, torch.empty = torch.empty, empty
    try:
        with count_bytes({**tensors, "scratch": arena}) as traffic:
            call.run()
    finally:
        torch.empty = original
    return call, traffic


def _aligned(numel: int, dtype: torch.dtype) -> Tensor:
    """Memory that starts at a multiple of a line and shares none with other memory."""
    lines = -(-numel * dtype.itemsize // LINE)
    memory = torch.zeros((lines + 1) * LINE, dtype=torch.uint8)
    start = -memory.data_ptr() % LINE
    return memory[start : start + numel * dtype.itemsize].view(dtype)


def _without_tables(traffic: Any) -> list[Any]:
    """The trace of what has a name. Tables and counters are small, and used too often for a cache to forget them."""
    return [access for access in traffic.trace if access.name != "other"]


def in_turns(trace: Iterable[Any], share: float) -> Iterator[Any]:
    """Reorder a trace launch by launch: this share of a launch's programs, at least one, take turns access by access.

    When one ends, the next begins. A program's accesses do not depend on when it runs, but for the few of the last one.
    """
    launches: dict[int, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for access in trace:
        launches[access.launch][access.program].append(access)
    for programs in launches.values():
        at_a_time = max(1, int(share * len(programs)))
        waiting = [programs[program] for program in sorted(programs, reverse=True)]
        running: list[Iterator[Any]] = []
        while waiting or running:
            while waiting and len(running) < at_a_time:
                running.append(iter(waiting.pop()))
            for program in list(running):
                access = next(program, None)
                if access is None:
                    running.remove(program)
                else:
                    yield access


@contextmanager
def _phases(reverse: bool) -> Iterator[None]:
    """Launch the factored kernels phase by phase, of which every second one goes backwards if asked to.

    For one matrix the tickets of the single launch have the same order.
    """
    from lowmem_kernels.factored import launch

    plan = launch.plan_order
    launch.plan_order = lambda facts: replace(plan(facts), reverse=reverse, phased=True)
    try:
        yield
    finally:
        launch.plan_order = plan


def _run(tasks: list[Task], interpret: bool, advance: Callable[[], None]) -> list[Any]:
    """Results of tasks in their order, from two processes. Triton decides at import whether it interprets."""
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in tasks]
        for future in as_completed(futures):
            future.result()
            advance()
        return [future.result() for future in futures]


def collect(progress: Progress) -> dict[str, Any]:
    """Return the whole report."""
    from lowmem_kernels.testing.aot import TARGETS
    from lowmem_kernels.testing.verbs import VERBS

    compiling: list[Task] = [
        (kernel_facts, (target, number))
        for target, gpu in TARGETS.items()
        for number in range(len(compile_cases(gpu.warp_size)))
    ]
    # what takes longest first, so that both processes end together
    curves: list[Task] = [(cache_curve, (verb, order)) for verb in CURVE_VERBS for order in ORDERS]
    counting: list[Task] = [
        *((verb_bytes, (verb, WIDE_SHAPE, "bf16")) for verb in WIDE_VERBS),
        *((verb_bytes, (verb, SHAPE, "bf16")) for verb in VERBS),
        # with parameters in float32 no state is narrower
        *((verb_bytes, (verb, SHAPE, "fp32")) for verb in VERBS if not verb.endswith("state as p")),
    ]
    results = {}
    for name, tasks, interpret in (("verbs", [*curves, *counting], True), ("kernels", compiling, False)):
        bar = progress.add_task(name, total=len(tasks))
        results[name] = _run(tasks, interpret, lambda bar=bar: progress.advance(bar))
    return {
        # without what follows a +, which says where the build came from
        "versions": {package: version(package).partition("+")[0] for package in ("torch", "triton")},
        "kernels": sorted(results["kernels"], key=lambda row: (row["case"], [*TARGETS].index(row["target"]))),
        "verbs": results["verbs"][len(curves) :],
        "cache": {"of_gradients": CACHE_OF_MATRIX},
        "curves": {
            "shape": list(CURVE_SHAPE),
            "dtype": CURVE_DTYPE,
            "cache_of_gradients": list(CURVE_SIZES),
            "rows": [row for rows in results["verbs"][: len(curves)] for row in rows],
        },
    }


def main(out: Annotated[Path, typer.Option(help="Folder for report.md and report.json.")] = FOLDER) -> None:
    """Report what can be known of the kernels without a GPU."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        report = collect(progress)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(render(report), encoding="utf-8")
    for name in ("report.md", "report.json"):
        console.print(out / name, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
