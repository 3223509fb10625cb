"""Many tensors, one launch: the table of addresses that a kernel walks instead of taking tensors as arguments.

A table is one int64 vector on the device. It starts with one row for each parameter,

    first_tile | numel | key | dims | ndim | address of column 0 | address of column 1 | ...

in order of ``first_tile``, so that a program finds its row by bisection. Programs are numbered through all tensors:
parameter k owns ``max(1, ceil(numel / tile))`` of them. After the rows come, for tensors that are not contiguous,
``ndim`` entries of (size, stride of column 0, stride of column 1) from the innermost dimension outwards; ``dims`` is
where they start in the vector.

A table is a pure function of its contents, so uploads are cached by contents and nothing has to be invalidated: a
gradient that moves to a new address, a parameter that is replaced, a checkpoint that is loaded all give other contents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .device import is_capturing, stream_id

#: Columns before the addresses, and the bytes to which an address is aligned where 16-byte accesses are promised.
HEADER = 5
ALIGNMENT = 16


class Layout(NamedTuple):
    """What a compiled kernel may assume of all tensors in its table."""

    aligned: bool
    strided: bool


@dataclass(frozen=True)
class Table:
    """One launch: the device vector, its rows, elements of a program, programs to start, the layout they may assume."""

    values: Tensor
    rows: int
    tile: int
    tiles: int
    layout: Layout


def tables(columns: Sequence[Sequence[Tensor]], keys: Sequence[int], tile: int) -> Iterator[Table]:
    """Yield a table for each layout that occurs: at most three, however many tensors there are.

    Args:
        columns: lists of equal length; columns 0 and 1 (parameter and gradient) may have any strides, the others are
            contiguous. All are on one device.
        keys: one 32-bit noise key for each parameter.
        tile: elements of one program.
    """
    rows: dict[Layout, list[int]] = {}
    for index, (param, grad) in enumerate(zip(columns[0], columns[1], strict=True)):
        strided = not (param.is_contiguous() and grad.is_contiguous())
        aligned = not strided and not any(column[index].data_ptr() % ALIGNMENT for column in columns)
        rows.setdefault(Layout(aligned, strided), []).append(index)
    for layout, members in rows.items():
        yield _table(layout, [[column[i] for column in columns] for i in members], [keys[i] for i in members], tile)


def _table(layout: Layout, tensors: list[list[Tensor]], keys: list[int], tile: int) -> Table:
    values: list[int] = []
    dims: list[int] = []
    tiles = 0
    dims_start = len(tensors) * (HEADER + len(tensors[0]))
    for row, key in zip(tensors, keys, strict=True):
        param, grad = row[0], row[1]
        extents = collapse(param.shape, param.stride(), grad.stride()) if layout.strided else []
        numel = param.numel()
        values += (tiles, numel, key, dims_start + len(dims), len(extents), *(t.data_ptr() for t in row))
        for extent in reversed(extents):
            dims += extent
        tiles += max(1, -(-numel // tile))
    return Table(_upload(tuple(values + dims), param.device), len(tensors), tile, tiles, layout)


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> list[tuple[int, ...]]:
    """Merge dimensions that every operand walks as one, outermost first: [(size, stride of operand 0, ...), ...]."""
    merged: list[tuple[int, ...]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1:], steps, strict=True)):
            size *= merged.pop()[0]
        merged.append((size, *steps))
    return merged


def counters(rows: int, device: torch.device) -> Tensor:
    """Return at least ``rows`` int32 zeros, one for each row of a table.

    They count a tensor's finished programs. The last one puts its counter back to 0, so the buffer is zero between
    launches of its (device, stream) pair, to which it belongs.
    """
    return _counters(1 << (rows - 1).bit_length(), device, stream_id(device))


@cache
def _counters(size: int, device: torch.device, stream: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


#: Tables recorded into a CUDA graph, with the host memory they are copied from at each replay. They live as long as
#: the process, since nothing tells when a graph is destroyed.
_captured: list[tuple[Tensor, Tensor]] = []


def _upload(values: tuple[int, ...], device: torch.device) -> Tensor:
    if is_capturing(device):
        _captured.append(_copy(values, device))
        return _captured[-1][0]
    return _cached_upload(values, device, stream_id(device))


@lru_cache(maxsize=256)
def _cached_upload(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _copy(values, device)[0]


def _copy(values: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    host = torch.tensor(values, dtype=torch.int64)
    if device.type == "cpu":
        return host, host
    # pinned memory comes from torch's caching allocator, which reuses it only after the copy has been done
    host = host.pin_memory()
    return host.to(device, non_blocking=True), host
