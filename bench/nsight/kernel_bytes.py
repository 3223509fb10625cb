"""Bytes that each kernel moved, from the counters of Nsight Compute, against the formula.

    lowmem profile --device cuda --formula formula.json      # prints the ncu command, which writes ncu.csv
    python bench/nsight/kernel_bytes.py ncu.csv --formula formula.json --out bytes.json

Reads what `ncu --csv` prints for `--page raw` (a column for each metric, units in the second row) and for the page
"details" (a row for each metric), with and without the lines that ncu and the program print around it.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

READ, WRITTEN, L2 = "dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_bytes.sum"
METRICS = (READ, WRITTEN, L2)
UNITS = {"byte": 1, "Kbyte": 10**3, "Mbyte": 10**6, "Gbyte": 10**9, "Tbyte": 10**12}
KERNEL, ID, RANGE = "Kernel Name", "ID", "Push/Pop_Range"


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, the NVTX range it is in ("" without NVTX), and bytes by metric."""

    kernel: str
    range: str
    nbytes: dict[str, float]


@dataclass(frozen=True)
class Moved:
    """What a kernel moved in a step: launches, and bytes from and to DRAM and through L2."""

    range: str
    kernel: str
    launches: float
    read: float
    written: float
    l2: float

    @property
    def dram(self) -> float:
        """Bytes from and to DRAM."""
        return self.read + self.written


def read_launches(lines: Iterable[str]) -> list[Launch]:
    """Return the launches in an output of ``ncu --csv``, in their order.

    Raises ValueError where there is no table, a metric is missing, a value is not a number (ncu writes "n/a" for what
    it could not count), or a unit is not one of bytes.
    """
    rows = csv.reader(line for line in lines if line.startswith('"'))
    header = next((row for row in rows if KERNEL in row), None)
    if header is None:
        raise ValueError(f'no line of column names with "{KERNEL}": is this what ncu --csv printed?')
    records = (dict(zip(header, row, strict=False)) for row in rows if len(row) == len(header))
    return list(_from_details(records) if "Metric Name" in header else _from_raw(records))


def _from_raw(records: Iterator[dict[str, str]]) -> Iterator[Launch]:
    units = next(records, {})
    if units.get(ID):
        raise ValueError("the row after the column names has an ID; with --page raw it has the units")
    for record in records:
        if missing := [metric for metric in METRICS if metric not in record]:
            raise ValueError(f"the launch with ID {record.get(ID)} has no {missing[0]}; pass it to ncu --metrics")
        nbytes = {metric: _bytes(record[metric], units[metric], metric) for metric in METRICS}
        yield Launch(record[KERNEL], _range(record), nbytes)


def _from_details(records: Iterable[dict[str, str]]) -> Iterator[Launch]:
    launches: dict[str, tuple[dict[str, str], dict[str, float]]] = {}
    for record in records:
        _, nbytes = launches.setdefault(record[ID], (record, {}))
        metric = record["Metric Name"]
        if metric in METRICS:
            nbytes[metric] = _bytes(record["Metric Value"], record["Metric Unit"], metric)
    for number, (record, nbytes) in launches.items():
        if missing := [metric for metric in METRICS if metric not in nbytes]:
            raise ValueError(f"the launch with ID {number} has no {missing[0]}; pass it to ncu --metrics")
        yield Launch(record[KERNEL], _range(record), nbytes)


def _bytes(text: str, unit: str, metric: str) -> float:
    if unit not in UNITS:
        raise ValueError(f"{metric} is in {unit!r}; allowed: {', '.join(UNITS)}")
    try:
        return float(text.replace(",", "")) * UNITS[unit]
    except ValueError:
        raise ValueError(f"{metric} is {text!r}, not a number: ncu could not count it") from None


def _range(record: dict[str, str]) -> str:
    """The innermost range pushed by the program: "<default domain>:NAME:none:..." after the number of the thread."""
    text = next((value for column, value in record.items() if RANGE in column), "")
    names = [part.split(":")[1] for part in text.split('"') if part.count(":") > 1]
    return names[-1] if names else ""


def moved_in_a_step(launches: Iterable[Launch], steps: int) -> list[Moved]:
    """Return what each kernel moved in each range, for one of ``steps`` steps, in the order of first launches."""
    groups: defaultdict[tuple[str, str], list[Launch]] = defaultdict(list)
    for launch in launches:
        groups[launch.range, launch.kernel].append(launch)
    return [
        Moved(*key, len(group) / steps, *(sum(launch.nbytes[metric] for launch in group) / steps for metric in METRICS))
        for key, group in groups.items()
    ]


def against_formula(moved: Iterable[Moved], formula: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return a row for each kernel and one for all of them, with bytes for each element where a formula is given.

    The row of all has ``least_bytes`` of the formula and ``times_least``, what went to and from DRAM by it; only
    kernels inside the formula's ranges count, where there are ranges.
    """
    rows = [{**asdict(entry), "dram": entry.dram} for entry in moved]
    ranges = set(formula["ranges"]) if formula else set()
    counted = [row for row in rows if row["range"] in ranges] or [row for row in rows if not row["range"]] or rows
    total: dict[str, Any] = {"range": "", "kernel": "all"}
    total |= {key: sum(row[key] for row in counted) for key in ("launches", "read", "written", "dram", "l2")}
    if formula:
        for row in (*rows, total):
            row["dram_per_element"] = row["dram"] / formula["elements"]
            row["l2_per_element"] = row["l2"] / formula["elements"]
        if formula["least_bytes"]:
            total["least_bytes"] = formula["least_bytes"]
            total["times_least"] = total["dram"] / formula["least_bytes"]
    return [*rows, total]


def show(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table in MB."""
    table = Table(caption="of one step, in 1e6 bytes")
    headers = ("kernel", "range", "launches", "DRAM read", "DRAM written", "L2", "DRAM / element", "DRAM / formula")
    for header in headers:
        table.add_column(header, justify="left" if header in ("kernel", "range") else "right")
    for row in rows:
        figures = [f"{row[key] / 1e6:,.1f}" for key in ("read", "written", "l2")]
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("dram_per_element", "times_least")]
        table.add_row(row["kernel"], row["range"], f"{row['launches']:g}", *figures, *ratios)
    return table


def main(
    counters: Annotated[Path, typer.Argument(help="What ncu --csv printed.")],
    formula: Annotated[Path | None, typer.Option(help="What lowmem profile --formula wrote.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps that were profiled.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None,
) -> None:
    """Compare the bytes that each kernel moved with the formula."""
    figures = json.loads(formula.read_text(encoding="utf-8")) if formula else None
    try:
        launches = read_launches(counters.read_text(encoding="utf-8").splitlines())
    except ValueError as error:
        raise typer.BadParameter(f"{counters}: {error}", param_hint="'COUNTERS'") from error
    rows = against_formula(moved_in_a_step(launches, steps or (figures["steps"] if figures else 1)), figures)
    Console().print(show(rows))
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
