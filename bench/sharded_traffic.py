"""Bytes that a process sends in an optimizer's step under FSDP2, by formula: python bench/sharded_traffic.py

Prints the tables of docs/distributed.md, for bfloat16 parameters and gradients. A sum of v float32 numbers over K
processes is a ring's all-reduce: 8 v (K - 1) / K bytes. A matrix that is put together on an owner costs what all of it,
its gradient and its state have, once in and, but for the gradient, once back, less the share that is there already.
`tests/optim/sharded_checks.py` and the tests of pieces count what the formulas say of small lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lowmem_kernels.pieces import RowPieces, RowPlace
from lowmem_kernels.projection.schedule import Work, pieces_of
from lowmem_kernels.testing.models import Architecture, model_shapes

Shapes = dict[str, tuple[int, ...]]

#: Llama-3 70B beside the models by name.
LLAMA_70B = Architecture(128256, 8192, 28672, 80, 64, 8).shapes()
PROCESSES = (8, 64, 1024)
ITEM, FLOAT = 2, 4


def summed(numbers: int, processes: int) -> float:
    """Bytes that each process sends to have float32 numbers summed."""
    return 2 * FLOAT * numbers * (processes - 1) / processes


def assembled(shapes: Sequence[tuple[int, ...]], states: float, processes: int) -> float:
    """Bytes that each process sends on average to have matrices put together, updated and sent back.

    ``states``: bytes of state for each element that go along.
    """
    elements = sum(map(math.prod, shapes))
    both_ways = (2 * ITEM + states) + (ITEM + states)
    return both_ways * elements / processes * (processes - 1) / processes


def matrices(shapes: Shapes, with_tables: bool) -> list[tuple[int, ...]]:
    """The matrices, with embedding and output layer or without."""
    tables = ("embed_tokens", "lm_head")
    return [s for name, s in shapes.items() if len(s) == 2 and (with_tables or not any(t in name for t in tables))]


def factored(shapes: Shapes, processes: int) -> float:
    """Adafactor, AdaLomo: two sums of each column, one of each matrix, two numbers of each parameter."""
    return summed(sum(2 * m + 3 for _, m in matrices(shapes, True)), processes)


def came(shapes: Shapes, processes: int) -> float:
    """CAME: those, and one more sum of each column and of each matrix."""
    return summed(sum(3 * m + 4 for _, m in matrices(shapes, True)), processes)


def sinkgd(shapes: Shapes, processes: int) -> float:
    """SinkGD: five sums of each column."""
    return summed(5 * sum(m for _, m in matrices(shapes, False)), processes)


def whole(states: float) -> Callable[[Shapes, int], float]:
    """Rules that put matrices together, with bytes of state for each element."""
    return lambda shapes, processes: assembled(matrices(shapes, False), states, processes)


def apollo(rank: int, tensor: bool) -> Callable[[Shapes, int], float]:
    """APOLLO, of which ``tensor`` says whether a matrix has one scale: what its kernels leave to be summed."""
    work = Work((0, 1, 2), rank, "std", False, True)

    def moved(shapes: Shapes, processes: int) -> float:
        listed = matrices(shapes, False)
        whole = RowPieces(tuple([n for n, _ in listed]), (RowPlace(0, 1, 0),) * len(listed), lambda vector: None)
        return summed(sum(pieces_of(listed, whole, work, tensor)[1]), processes)

    return moved


RULES: dict[str, Callable[[Shapes, int], float]] = {
    "AdamW, Lomo": lambda shapes, processes: 0.0,
    "Adafactor, AdaLomo": factored,
    "CAME": came,
    "SinkGD": sinkgd,
    "SWAN, MNGD with spectral": whole(0.0),
    "APOLLOMini": apollo(1, True),
    "APOLLO, rank 256": apollo(256, False),
    "AdaPM": whole(4.0),
}


def described(nbytes: float) -> str:
    """Bytes in MB, or 0."""
    return "0" if nbytes == 0 else f"{nbytes / 1e6:,.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.2f} GB"


def table(title: str, shapes: Shapes) -> str:
    """A line for each rule, and FSDP2's own: two all-gathers of parameters and a reduce-scatter of gradients."""
    rows = [
        f"| {title} | " + " | ".join(f"{k} processes" for k in PROCESSES) + " |",
        "|---" * (len(PROCESSES) + 1) + "|",
    ]
    for name, rule in RULES.items():
        rows.append(f"| {name} | " + " | ".join(described(rule(shapes, k)) for k in PROCESSES) + " |")
    elements = sum(map(math.prod, shapes.values()))
    own = [described(3 * ITEM * elements * (k - 1) / k) for k in PROCESSES]
    rows.append("| FSDP2 itself, forward and backward | " + " | ".join(own) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table("Llama 7B", model_shapes("llama-7b")), table("Llama 3 70B", LLAMA_70B), sep="\n\n")
