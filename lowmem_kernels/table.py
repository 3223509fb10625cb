"""Many tensors, one launch: the table of addresses that a kernel walks instead of taking tensors as arguments.

A table is one int64 vector on the device. It starts with one row for each parameter,

    first_tile | numel | key | dims | ndim | address of column 0 | address of column 1 | ...

in order of ``first_tile``, so that a program finds its row by bisection. Programs are numbered through all tensors:
parameter k owns ``max(1, ceil(numel / tile))`` of them. After the rows come, for tensors that are not contiguous,
``ndim`` entries of (size, stride of column 0, stride of column 1) from the innermost dimension outwards; ``dims`` is
where they start in the vector.

A table is a pure function of addresses, sizes and strides, so it is cached by them and nothing has to be invalidated: a
gradient that moves, a parameter that is replaced, a checkpoint that is loaded give another table. In the steady state
of training a step costs the host the reading of the addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
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
    """One launch: the device vector, its rows, elements of a program, programs to start, the layout they may assume.

    ``host`` is what ``values`` is copied from, at every replay again when the copy is part of a CUDA graph.
    """

    values: Tensor
    host: Tensor
    rows: int
    tile: int
    tiles: int
    layout: Layout


def tables(
    columns: Sequence[Sequence[Tensor]], keys: Sequence[int], tile: int, scalars: Sequence[Sequence[Tensor]] = ()
) -> tuple[Table, ...]:
    """Return a table for each layout that occurs: at most three, however many tensors there are.

    Args:
        columns: lists of equal length; columns 0 and 1 (parameter and gradient) may have any strides, the others are
            contiguous. All are on one device.
        keys: one 32-bit noise key for each parameter.
        tile: elements of one program.
        scalars: further columns, of 0-d tensors: step counters are often one vector, and where a counter lies must not
            cost its parameter the 16-byte accesses.
    """
    params, grads = columns[0], columns[1]
    device = params[0].device
    # a table recorded into a CUDA graph must outlive the cache
    build = _captured_tables if is_capturing(device) else _cached_tables
    return build(
        device,
        stream_id(device),
        tile,
        tuple([tuple([t.data_ptr() for t in column]) for column in (*columns, *scalars)]),
        len(columns),
        tuple([p.numel() for p in params]),
        tuple([_strides(p, g) for p, g in zip(params, grads, strict=True)]),
        tuple(keys),
    )


#: Shape and strides of a parameter and its gradient where one of them is not contiguous.
Strides = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _strides(param: Tensor, grad: Tensor) -> Strides | None:
    if param.is_contiguous() and grad.is_contiguous():
        return None
    return tuple(param.shape), param.stride(), grad.stride()


def _build_tables(
    device: torch.device,
    stream: int,
    tile: int,
    addresses: tuple[tuple[int, ...], ...],
    vectors: int,
    numels: tuple[int, ...],
    strides: tuple[Strides | None, ...],
    keys: tuple[int, ...],
) -> tuple[Table, ...]:
    members: dict[Layout, list[int]] = {}
    for i, strided in enumerate(strides):
        aligned = strided is None and not any(column[i] % ALIGNMENT for column in addresses[:vectors])
        members.setdefault(Layout(aligned, strided is not None), []).append(i)
    built = []
    for layout, rows in members.items():
        values: list[int] = []
        dims: list[int] = []
        tiles = 0
        dims_start = len(rows) * (HEADER + len(addresses))
        for i in rows:
            extents = collapse(*strides[i]) if strides[i] is not None else []  # type: ignore[misc]
            values += (tiles, numels[i], keys[i], dims_start + len(dims), len(extents))
            values += (column[i] for column in addresses)
            for extent in reversed(extents):
                dims += extent
            tiles += max(1, -(-numels[i] // tile))
        built.append(Table(*_copy(values + dims, device), len(rows), tile, tiles, layout))
    return tuple(built)


_cached_tables = lru_cache(maxsize=256)(_build_tables)


def _captured_tables(*contents: Any) -> tuple[Table, ...]:
    built = _build_tables(*contents)
    _captured.append(built)
    return built


#: Tables recorded into CUDA graphs. They live as long as the process, since nothing tells when a graph is destroyed.
_captured: list[tuple[object, ...]] = []


def device_vector(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return an int64 vector on ``device``, cached by its contents; one that a CUDA graph reads lives for ever."""
    if is_capturing(device):
        return captured_vector(values, device)
    return _cached_vector(values, device, stream_id(device))


@lru_cache(maxsize=256)
def _cached_vector(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return vector(values, device)


def captured_vector(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Return an int64 vector on ``device`` that lives for ever, as what a CUDA graph copies from and reads has to."""
    _captured.append(_copy(values, device))
    return _captured[-1][0]  # type: ignore[return-value]


def vector(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Return a new int64 vector on ``device``, copied without waiting."""
    return _copy(values, device)[0]


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
    launches of its (device, stream) pair, to which it belongs. While a CUDA graph is captured nothing runs, zeroing
    included, so a graph gets counters of its own.
    """
    if is_capturing(device):
        return torch.zeros(rows, dtype=torch.int32, device=device)
    return _counters(1 << (rows - 1).bit_length(), device, stream_id(device))


@cache
def _counters(size: int, device: torch.device, stream: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def _copy(values: Sequence[int] | np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    host = torch.from_numpy(np.asarray(values, dtype=np.int64))
    if device.type == "cpu":
        return host, host
    # pinned memory comes from torch's caching allocator, which reuses it only after the copy has been done
    host = host.pin_memory()
    return host.to(device, non_blocking=True), host
