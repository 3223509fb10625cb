"""What `lowmem bench` measures of each contender, and the figures that follow from it."""

import csv
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lowmem_kernels.testing.models import Shapes
from lowmem_optim.cli.contenders import COPY, Contender, copier, make_tensors, parameters
from lowmem_optim.cli.measure import state_bytes, temporary_bytes
from lowmem_optim.cli.timing import Seconds, Step, Stopwatch, count_launches, interleaved

PERCENTILES = (20, 50, 80)
#: Columns of the CSV that are measured or follow from what is; ratios and the circumstances come after them.
COLUMNS = (
    "contender",
    "kind",
    "left_out",
    *(f"ms_{percent}" for percent in PERCENTILES),
    "host_us",
    "least_bytes",
    "least_bytes_per_parameter",
    "gb_per_s",
    "percent_of_copy",
    "launches",
    "state_bytes",
    "extra_bytes",
)


@dataclass(frozen=True)
class Row:
    """A contender's figures, None where there is none.

    kind: "copy", "other" or "ours".
    left_out: why it was not timed; empty if it was.
    ms: percentiles 20, 50 and 80 of the milliseconds of a step.
    host_us: median microseconds until step() returned.
    least_bytes: by formula, that a step has to move.
    launches: kernels of a step.  state_bytes: kept between steps.  extra_bytes: needed on top in a step, at its peak.
    """

    contender: str
    kind: str
    left_out: str = ""
    ms: tuple[float, ...] | None = None
    host_us: float | None = None
    least_bytes: int | None = None
    launches: int | None = None
    state_bytes: int | None = None
    extra_bytes: int | None = None

    @property
    def median(self) -> float | None:
        """Median milliseconds of a step."""
        return None if self.ms is None else self.ms[1]

    @property
    def gb_per_s(self) -> float | None:
        """Least bytes by the median time, in 1e9 bytes a second."""
        return None if self.least_bytes is None or self.median is None else self.least_bytes / self.median / 1e6

    def times_faster_than(self, other: "Row") -> float | None:
        """The other's median time by this one's."""
        return None if self.median is None or other.median is None else other.median / self.median


@dataclass(frozen=True)
class Workload:
    """What all contenders work on: the model's parameters by name, their dtype, the device and the rounds."""

    shapes: Shapes
    dtype: torch.dtype
    device: torch.device
    rounds: int


def run(work: Workload, contenders: list[Contender], advance: Callable[[str, int], object]) -> list[Row]:
    """Times all contenders in turns, then looks at one more step of each; rows in the contenders' order, copy first.

    `advance` is called with what is going on and how many steps are done of `total_steps`. A contender of others that
    fails here is left out, with its reason, and any for which there is not enough memory.
    """
    values, grads = make_tensors(work.shapes, work.dtype, work.device)
    left_out: dict[str, str] = {}
    optimizers: dict[str, Optimizer] = {}
    steps: dict[str, Step] = {COPY: copier(values)}
    for contender in contenders:
        advance(f"first step of {contender.name}", 0)
        reason = contender.why_not(work.shapes, work.device) or _first_step(contender, values, grads, optimizers, steps)
        if reason is not None:
            left_out[contender.name] = reason
        advance(contender.name, 1)
    times = interleaved(steps, work.rounds, Stopwatch(work.device), lambda name: advance(name, 1))
    rows = [_copy_row(steps[COPY], times[COPY], values, work)]
    for contender in contenders:
        kind = "ours" if contender.is_ours else "other"
        name = contender.name
        if name in left_out:
            rows.append(Row(name, kind, left_out[name]))
            continue
        moved = contender.moved
        rows.append(
            Row(
                name,
                kind,
                **_measured(steps[name], times[name], work.device),
                least_bytes=None if moved is None else moved.least(work.shapes, work.dtype.itemsize),
                state_bytes=state_bytes(optimizers[name]),
            )
        )
    return rows


def total_steps(contenders: list[Contender], rounds: int) -> int:
    """What `run` advances by if none is left out."""
    return len(contenders) + rounds * (len(contenders) + 1)


def _first_step(
    contender: Contender,
    values: list[Tensor],
    grads: list[Tensor],
    optimizers: dict[str, Optimizer],
    steps: dict[str, Step],
) -> str | None:
    """Makes a contender and takes its first step, which makes its state; returns why that failed."""
    try:
        optimizer = contender.make(parameters(values, grads))
        step = contender.step(optimizer)
        step()
    except torch.OutOfMemoryError:
        return "not enough memory"
    except Exception as error:
        if contender.is_ours:
            raise
        return f"its first step failed: {(str(error) or repr(error)).splitlines()[0]}"
    optimizers[contender.name], steps[contender.name] = optimizer, step
    return None


def _copy_row(step: Step, times: list[Seconds], values: list[Tensor], work: Workload) -> Row:
    nbytes = 2 * sum(value.nbytes for value in values)
    return Row(COPY, "copy", **_measured(step, times, work.device), least_bytes=nbytes, state_bytes=0)


def _measured(step: Step, times: list[Seconds], device: torch.device) -> dict[str, Any]:
    hosts = [time.host for time in times if time.host is not None]
    return {
        "ms": tuple(float(ms) for ms in np.percentile([time.step * 1e3 for time in times], PERCENTILES)),
        "host_us": statistics.median(hosts) * 1e6 if hosts else None,
        "launches": count_launches(step, device),
        "extra_bytes": temporary_bytes(step, device),
    }


def figures(row: Row, rows: list[Row], parameters: int) -> dict[str, Any]:
    """A row under the names of `COLUMNS`, and for each other contender how many times faster than that it is."""
    copy = next(row for row in rows if row.kind == "copy")
    found: dict[str, Any] = {
        "contender": row.contender,
        "kind": row.kind,
        "left_out": row.left_out,
        **dict(zip(COLUMNS[3:6], row.ms or (None,) * 3, strict=True)),
        "host_us": row.host_us,
        "least_bytes": row.least_bytes,
        "least_bytes_per_parameter": None if row.least_bytes is None else row.least_bytes / parameters,
        "gb_per_s": row.gb_per_s,
        "percent_of_copy": percent_of_copy(row, copy),
        "launches": row.launches,
        "state_bytes": row.state_bytes,
        "extra_bytes": row.extra_bytes,
    }
    ratios = {f"times_faster_than {other.contender}": row.times_faster_than(other) for other in baselines(rows)}
    return found | ratios


def percent_of_copy(row: Row, copy: Row) -> float | None:
    """A row's rate as a percentage of that of the copy."""
    rate, copied = row.gb_per_s, copy.gb_per_s
    return None if rate is None or copied is None else 100 * rate / copied


def baselines(rows: list[Row]) -> list[Row]:
    """The copy, and those of others that were timed."""
    return [row for row in rows if row.kind != "ours" and not row.left_out]


def write_csv(path: Path, rows: list[Row], parameters: int, circumstances: dict[str, Any]) -> None:
    """Writes a line for each row, which ends in the circumstances, the same for all; blank where there is nothing."""
    lines = [figures(row, rows, parameters) | circumstances for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
