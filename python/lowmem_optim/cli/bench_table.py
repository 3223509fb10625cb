"""The figures of `lowmem bench` on the terminal."""

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from lowmem_optim.cli.arguments import ABSENT
from lowmem_optim.cli.bench_rows import Row, percent_of_copy
from lowmem_optim.cli.contenders import OTHERS
from lowmem_optim.cli.report import MIB

WIDTH = 96  # below that names and figures would be cut
NOTES = {
    "cpu": "ms: median, and 20th to 80th percentile, of steps that take turns. bytes: the least a step has to move "
    "by formula; GB/s: those by the median. more MiB: growth of resident memory in a step, at its peak. Host time and "
    "launches are not separable on a CPU.",
    "cuda": "ms: median, and 20th to 80th percentile, of steps that take turns, between events on the device. host µs: "
    "until step() returned. bytes: the least a step has to move by formula; GB/s: those by the median. more MiB: "
    "allocated in a step, at its peak.",
}


def show(console: Console, title: str, rows: list[Row], parameters: int, device: str) -> None:
    """Prints a line for each contender that was timed, how they compare, and why the others were left out."""
    console = Console(file=console.file, width=max(console.width, WIDTH))
    timed = [row for row in rows if not row.left_out]
    console.print(f"\n{title}", highlight=False)
    console.print(_times(timed, parameters))
    console.print(NOTES[device.partition(":")[0]], highlight=False)
    console.print(_ratios(timed))
    for row in rows:
        if row.left_out:
            console.print(f"left out: {row.contender}: {row.left_out}", highlight=False, markup=False)


def _times(rows: list[Row], parameters: int) -> Table:
    copy = next(row for row in rows if row.kind == "copy")
    columns: list[tuple[str, Callable[[Row], str | None]]] = [
        ("ms", lambda row: _figure(row.median)),
        ("20-80 %", lambda row: None if row.ms is None else f"{_figure(row.ms[0])}-{_figure(row.ms[2])}"),
        ("host\nµs", lambda row: _form("{:,.0f}", row.host_us)),
        ("launches", lambda row: _form("{:,}", row.launches)),
        ("bytes/\nparam.", lambda row: _form("{:.2f}", _per(row.least_bytes, parameters))),
        ("GB/s", lambda row: _figure(row.gb_per_s)),
        ("% of\ncopy", lambda row: _figure(percent_of_copy(row, copy))),
        ("state\nMiB", lambda row: _figure(_per(row.state_bytes, MIB))),
        ("more\nMiB", lambda row: _figure(_per(row.extra_bytes, MIB))),
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    shown = [(name, form) for name, form in columns if any(map(form, rows))]  # a CPU has no host times, no launches
    for name, _ in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.contender, *(form(row) or ABSENT for _, form in shown))
    return table


def _ratios(rows: list[Row]) -> Table:
    """For each of this package's, how many times faster it is than each that one would use instead."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("times faster than (medians)")
    for row in rows:
        if row.kind == "ours":
            rivals = {other.name for other in OTHERS if row.contender.partition(",")[0] in other.rivals}
            found = [(row.times_faster_than(other), other.contender) for other in rows if other.contender in rivals]
            table.add_row(row.contender, ", ".join(f"{ratio:.2f} {name}" for ratio, name in found) or ABSENT)
    return table


def _per(value: int | None, unit: int) -> float | None:
    return None if value is None else value / unit


def _figure(value: float | None) -> str | None:
    """About three digits."""
    if value is None:
        return None
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _form(form: str, value: float | None) -> str | None:
    return None if value is None else form.format(value)
