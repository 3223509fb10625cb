"""Many tensors, one launch: the table of addresses that a kernel walks instead of taking tensors as arguments.

A table is one int64 vector on the device. It starts with one row for each parameter,

    first_tile | numel | key | dims | ndim | address of column 0 | address of column 1 | ...

in order of ``first_tile``, so that a program finds its row by bisection. Programs are numbered through all tensors:
parameter k owns ``max(1, ceil(numel / tile))`` of them. After the rows come, for tensors that are not contiguous,
``ndim`` entries of (size, stride of column 0, stride of column 1) from the innermost dimension outwards; ``dims`` is
where they start in the vector. `Shard.entries` follows those, or is at ``dims`` where there are none, for a shard
of a parameter.

Gradients are new tensors in every step, so their addresses are looked up in every call, and the table is copied to the
device again where they have changed. The rest is looked up once for lists that are `Tensors` (tensors.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .device import is_capturing, stream_id
from .shards import Shard
from .tensors import remembered

#: Columns before the addresses, and the bytes to which an address is aligned where 16-byte accesses are promised.
HEADER = 5
ALIGNMENT = 16


class Layout(NamedTuple):
    """What a compiled kernel may assume of all tensors in its table.

    ``digits``: 0 for whole tensors, 1 for shards that are ranges of a whole, 2 for shards in pieces.
    """

    aligned: bool
    strided: bool
    digits: int = 0


@dataclass(frozen=True)
class Table:
    """One launch: the device vector, its rows, elements of a program, programs to start, the layout they may assume."""

    values: Tensor
    rows: int
    tile: int
    tiles: int
    layout: Layout


#: Shape and strides of a parameter and its gradient where one of them is not contiguous.
Strides = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def tables(
    columns: Sequence[Sequence[Tensor]],
    keys: Sequence[int],
    tile: int,
    scalars: Sequence[Sequence[Tensor]] = (),
    shards: Sequence[Shard | None] | None = None,
) -> tuple[Table, ...]:
    """Return a table for each layout that occurs: few (three without shards), however many tensors there are.

    Args:
        columns: lists of equal length; columns 0 and 1 (parameter and gradient) may have any strides, the others are
            contiguous. All are on one device.
        keys: one 32-bit noise key for each parameter.
        tile: elements of one program.
        scalars: further columns, of 0-d tensors: step counters are often one vector, and where a counter lies must not
            cost its parameter the 16-byte accesses.
        shards: which part of a whole each parameter is, None where it is all of it.
    """
    params, grads = columns[0], columns[1]
    where = addresses([*columns, *scalars])
    strides = strides_of(params, grads)
    aligned = starts_aligned(where[:, : len(columns)])
    built = []
    parts = (None,) * len(params) if shards is None else tuple(shards)
    what = (strides, tuple(keys), tile, aligned.tobytes(), where.shape[1], parts)
    for rows in remembered([params], ("rows", *what), lambda: _rows_by_layout(params, *what)):
        rows.values[:, HEADER:] = where[rows.members]
        vector = uploaded(params, rows, np.concatenate([rows.values.ravel(), rows.dims]))
        built.append(Table(vector, len(rows.members), tile, rows.tiles, rows.layout))
    return tuple(built)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of one layout: which parameters, [rows, HEADER + columns] of which the addresses are to be filled in."""

    members: list[int]
    layout: Layout
    tiles: int
    values: np.ndarray
    dims: np.ndarray


def _rows_by_layout(
    params: Sequence[Tensor],
    strides: Sequence[Strides | None],
    keys: tuple[int, ...],
    tile: int,
    aligned: bytes,
    columns: int,
    shards: Sequence[Shard | None],
) -> list[_Rows]:
    members: dict[Layout, list[int]] = {}
    for i, strided in enumerate(strides):
        layout = Layout(strided is None and bool(aligned[i]), strided is not None, _digits(shards[i]))
        members.setdefault(layout, []).append(i)
    built = []
    for layout, rows in members.items():
        values = np.zeros((len(rows), HEADER + columns), dtype=np.int64)
        dims: list[int] = []
        tiles = 0
        for row, i in zip(values, rows, strict=True):
            numel, strided, shard = params[i].numel(), strides[i], shards[i]
            extents = collapse(*strided) if strided is not None else []
            row[:HEADER] = tiles, numel, keys[i], values.size + len(dims), len(extents)
            for extent in reversed(extents):
                dims += extent
            dims += () if shard is None else shard.entries()
            tiles += max(1, -(-numel // tile))
        built.append(_Rows(rows, layout, tiles, values, np.array(dims, dtype=np.int64)))
    return built


def _digits(shard: Shard | None) -> int:
    return 0 if shard is None else 1 if shard.is_range else 2


def addresses(columns: Sequence[Sequence[Tensor | None] | None]) -> np.ndarray:
    """Return the addresses of lists of tensors, int64 [tensors, lists]: 0 where there is no tensor, or no list.

    List 1 is the gradients, which are new in every step; the others are looked up once if they are `Tensors`.
    """
    count = len(columns[0] or ())
    first, grads, *others = columns
    kept = remembered([first, *others], "addresses", lambda: np.stack([_column(c, count) for c in columns], axis=1))
    now = kept.copy()
    now[:, 1] = [*map(Tensor.data_ptr, grads)]  # type: ignore[arg-type]
    return now


def _column(tensors: Sequence[Tensor | None] | None, count: int) -> np.ndarray:
    if tensors is None:
        return np.zeros(count, dtype=np.int64)
    return np.array([0 if t is None else t.data_ptr() for t in tensors], dtype=np.int64)


def starts_aligned(where: np.ndarray) -> np.ndarray:
    """Say of each row of addresses whether all of them are multiples of ALIGNMENT (0, no tensor, is)."""
    aligned: np.ndarray = np.bitwise_or.reduce(where, axis=1) % ALIGNMENT == 0
    return aligned


def strides_of(params: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Strides | None, ...]:
    """Return shape and strides of each parameter and gradient, None where both are contiguous."""

    def usual() -> tuple[bool, tuple[Strides | None, ...]]:
        return all([p.is_contiguous() for p in params]), (None,) * len(params)

    contiguous, nothing = remembered([params], "contiguous", usual)
    if contiguous and all(map(Tensor.is_contiguous, grads)):
        return nothing
    return tuple(
        [
            None if p.is_contiguous() and g.is_contiguous() else (tuple(p.shape), p.stride(), g.stride())
            for p, g in zip(params, grads, strict=True)
        ]
    )


#: What was recorded into CUDA graphs lives as long as the process, since nothing tells when a graph is destroyed.
_captured: list[tuple[Tensor, Tensor]] = []


def uploaded(params: Sequence[Tensor], what: Hashable, values: np.ndarray) -> Tensor:
    """Return int64 ``values`` on the parameters' device: those of the last call if they are the same, and ``what`` is.

    Nothing waits. The copy starts from pinned memory of torch's caching allocator, which is not used again before the
    copy is done, and goes to memory of its own, so that what an earlier launch still reads is not overwritten. In a
    CUDA graph, a copy is part of every replay, and so of the values as they are now.
    """
    device = params[0].device
    if is_capturing(device):
        _captured.append(_copy(values, device))
        return _captured[-1][0]
    last: list[Any] = remembered([params], ("uploaded", what, stream_id(device)), lambda: [None, None])
    if last[0] is not values and (last[0] is None or not np.array_equal(last[0], values)):
        last[:] = values, _copy(values, device)[0]
    vector: Tensor = last[1]
    return vector


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


def shard_of_digits(first: int, sizes: Sequence[int], strides: Sequence[int]) -> Shard | None:
    """Return the shard whose elements have digits of these sizes and strides; None: some of the first, in order."""
    shard = Shard(first, tuple([(size, stride) for size, stride in collapse(sizes, strides)]))
    return None if shard.is_range and first == 0 else shard


def offsets_of(shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """Return the offsets in memory, in elements, of all elements in logical order: int64."""
    offsets = np.zeros(1, dtype=np.int64)
    for size, stride in zip(shape, strides, strict=True):
        offsets = np.add.outer(offsets, np.arange(size, dtype=np.int64) * stride).ravel()
    return offsets


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


def _copy(values: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(values on the device, what they are copied from)."""
    host = torch.from_numpy(values)
    if device.type == "cpu":
        return host, host
    host = host.pin_memory()
    return host.to(device, non_blocking=True), host
