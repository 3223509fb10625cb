"""Count the bytes that kernels request, tensor by tensor, in Triton's interpreter, and what a cache leaves to DRAM."""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_LINE_BYTES = 128
_OTHER = "other"


class Access(NamedTuple):
    """A load, store or atomic operation of one program on one tensor: the launch and the program, counted from 0;
    whether it writes; the tensor's name; the distinct lines of 128 bytes, as address // 128."""

    launch: int
    program: int
    writes: bool
    name: str
    lines: np.ndarray


@dataclass
class Traffic:
    """Bytes requested by the kernels run so far; masked-out elements request nothing, and caches do not exist.

    read, written, atomic: bytes by tensor name; "other" holds addresses outside all named tensors. An atomic operation
        counts its element once, in `atomic` only.
    lines_read, lines_written: distinct 128-byte lines that loads and stores touch, by tensor name, as address // 128;
        `128 * len(lines)` well above the bytes means that accesses are scattered.
    trace: every access in the order in which the interpreter made it, which `dram_bytes` replays.
    """

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    atomic: Counter[str] = field(default_factory=Counter)
    lines_read: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    lines_written: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    trace: list[Access] = field(default_factory=list, repr=False)


def dram_bytes(trace: Iterable[Access], cache_bytes: int) -> tuple[Counter[str], Counter[str]]:
    """Return what a cache of ``cache_bytes`` reads from DRAM and writes to it in the course of a trace, by tensor name.

    A model: the cache forgets the line least recently used, whatever set it would be in; it starts empty, takes a
    written line without reading it, and writes it when it is forgotten or in the end.
    """
    capacity = cache_bytes // _LINE_BYTES
    read, written = Counter[str](), Counter[str]()
    # line -> name of the tensor if it has been written, else None
    cached: OrderedDict[int, str | None] = OrderedDict()
    for access in trace:
        for line in access.lines.tolist():
            if line in cached:
                cached.move_to_end(line)
            else:
                cached[line] = None
                if not access.writes:
                    read[access.name] += _LINE_BYTES
            if access.writes:
                cached[line] = access.name
            if len(cached) > capacity:
                _, dirty = cached.popitem(last=False)
                if dirty is not None:
                    written[dirty] += _LINE_BYTES
    for dirty in cached.values():
        if dirty is not None:
            written[dirty] += _LINE_BYTES
    return read, written


@contextmanager
def count_bytes(tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> Iterator[Traffic]:
    """Count what the kernels run inside the block request of each named tensor; needs TRITON_INTERPRET=1.

        with count_bytes({"param": param, "grads": [grad_a, grad_b]}) as traffic:
            launch(...)
        assert traffic.read["param"] == param.numel() * param.element_size()

    Tensors of one list are counted together under its name; they are CPU tensors and outlive the block.
    The interpreter's builder is wrapped for the length of the block, whatever happens inside.
    Raises ValueError if two tensors overlap in memory.
    """
    traffic = Traffic()
    spans = _Spans(tensors)

    launch = -1

    def count_launch(builder: InterpreterBuilder, *_: Any) -> None:
        nonlocal launch
        launch += 1

    def count(
        builder: InterpreterBuilder,
        ptrs: TensorHandle,
        mask: Any,
        writes: bool,
        total: Counter[str],
        touched: defaultdict[str, set[int]] | None = None,
    ) -> None:
        for name, nbytes, lines in spans.split(ptrs, mask):
            total[name] += nbytes
            if touched is not None:
                touched[name].update(lines.tolist())
            traffic.trace.append(Access(launch, builder.grid_idx[0], writes, name, lines))

    def count_load(builder: InterpreterBuilder, ptrs: TensorHandle, mask: Any, *_: Any, **__: Any) -> None:
        count(builder, ptrs, mask, False, traffic.read, traffic.lines_read)

    def count_store(builder: InterpreterBuilder, ptrs: TensorHandle, value: Any, mask: Any, *_: Any, **__: Any) -> None:
        count(builder, ptrs, mask, True, traffic.written, traffic.lines_written)

    def count_rmw(
        builder: InterpreterBuilder, op: Any, ptrs: TensorHandle, value: Any, mask: Any, *_: Any, **__: Any
    ) -> None:
        count(builder, ptrs, mask, True, traffic.atomic)

    def count_cas(builder: InterpreterBuilder, ptrs: TensorHandle, *_: Any, **__: Any) -> None:
        count(builder, ptrs, None, True, traffic.atomic)

    # every other load and store of the interpreter, descriptors included, ends in the masked ones
    counters: dict[str, Callable[..., None]] = {
        "set_grid_dim": count_launch,
        "create_masked_load": count_load,
        "create_masked_store": count_store,
        "create_atomic_rmw": count_rmw,
        "create_atomic_cas": count_cas,
    }
    originals = {name: getattr(InterpreterBuilder, name) for name in counters}
    try:
        for name, counter in counters.items():
            setattr(InterpreterBuilder, name, _counted(counter, originals[name]))
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)


def _counted(count: Callable[..., None], original: Callable[..., Any]) -> Callable[..., Any]:
    """The builder method `original`, calling `count` on its arguments first."""

    def method(builder: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
        count(builder, *args, **kwargs)
        return original(builder, *args, **kwargs)

    return method


class _Spans:
    """The address ranges of named tensors, in order of address."""

    def __init__(self, tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
        spans = sorted(
            (*_span(tensor), name)
            for name, group in tensors.items()
            for tensor in ([group] if isinstance(group, Tensor) else group)
            if tensor.numel()
        )
        for (_, end, name), (start, _, following) in pairwise(spans):
            if start < end:
                raise ValueError(f"tensors of {name!r} and {following!r} overlap in memory")
        self._starts = np.array([start for start, _, _ in spans], dtype=np.uint64)
        self._ends = np.array([end for _, end, _ in spans], dtype=np.uint64)
        self._names = [name for _, _, name in spans]

    def split(self, ptrs: TensorHandle, mask: Any) -> Iterator[tuple[str, int, np.ndarray]]:
        """Split the elements of one access whose mask is true by tensor: (name, bytes, distinct lines)."""
        addresses = np.asarray(ptrs.data)
        if mask is not None:
            # block pointers and descriptors pass a bare array as the mask
            addresses = addresses[np.broadcast_to(np.asarray(getattr(mask, "data", mask), dtype=bool), addresses.shape)]
        element_bytes = ptrs.get_element_ty().primitive_bitwidth // 8
        for name, group in self._by_name(addresses.ravel()):
            yield name, group.size * element_bytes, np.unique(group // np.uint64(_LINE_BYTES))

    def _by_name(self, addresses: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Split `addresses` by the tensor they fall in."""
        before = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        for index in np.unique(before):
            group = addresses[before == index]
            inside = group < self._ends[index] if index >= 0 else np.zeros(group.shape, dtype=bool)
            if inside.any():
                yield self._names[index], group[inside]
            if not inside.all():
                yield _OTHER, group[~inside]


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor's elements and the one after its last, gaps between strided elements included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
