"""Count the bytes that kernels request, tensor by tensor, in Triton's interpreter."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_LINE_BYTES = 128
_OTHER = "other"


@dataclass
class Traffic:
    """Bytes requested by the kernels run so far; masked-out elements request nothing, and caches do not exist.

    read, written, atomic: bytes by tensor name; "other" holds addresses outside all named tensors. An atomic operation
        counts its element once, in `atomic` only.
    lines_read, lines_written: distinct 128-byte lines that loads and stores touch, by tensor name, as address // 128;
        `128 * len(lines)` well above the bytes means that accesses are scattered.
    """

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    atomic: Counter[str] = field(default_factory=Counter)
    lines_read: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    lines_written: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))


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

    def count_load(ptrs: TensorHandle, mask: Any, *_: Any, **__: Any) -> None:
        spans.add(ptrs, mask, traffic.read, traffic.lines_read)

    def count_store(ptrs: TensorHandle, value: Any, mask: Any, *_: Any, **__: Any) -> None:
        spans.add(ptrs, mask, traffic.written, traffic.lines_written)

    def count_rmw(op: Any, ptrs: TensorHandle, value: Any, mask: Any, *_: Any, **__: Any) -> None:
        spans.add(ptrs, mask, traffic.atomic)

    def count_cas(ptrs: TensorHandle, *_: Any, **__: Any) -> None:
        spans.add(ptrs, None, traffic.atomic)

    # every other load and store of the interpreter, descriptors included, ends in the first two
    counters: dict[str, Callable[..., None]] = {
        "create_masked_load": count_load,
        "create_masked_store": count_store,
        "create_atomic_rmw": count_rmw,
        "create_atomic_cas": count_cas,
    }
    originals = {name: getattr(InterpreterBuilder, name) for name in counters}
    try:
        for name, count in counters.items():
            setattr(InterpreterBuilder, name, _counted(count, originals[name]))
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)


def _counted(count: Callable[..., None], original: Callable[..., Any]) -> Callable[..., Any]:
    """The builder method `original`, calling `count` on its arguments first."""

    def method(builder: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
        count(*args, **kwargs)
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

    def add(
        self, ptrs: TensorHandle, mask: Any, total: Counter[str], lines: defaultdict[str, set[int]] | None = None
    ) -> None:
        """Add the elements of one access whose mask is true to `total` and `lines`."""
        addresses = np.asarray(ptrs.data)
        if mask is not None:
            # block pointers and descriptors pass a bare array as the mask
            addresses = addresses[np.broadcast_to(np.asarray(getattr(mask, "data", mask), dtype=bool), addresses.shape)]
        addresses = addresses.ravel()
        element_bytes = ptrs.get_element_ty().primitive_bitwidth // 8
        for name, group in self._by_name(addresses):
            total[name] += group.size * element_bytes
            if lines is not None:
                lines[name].update(np.unique(group // np.uint64(_LINE_BYTES)).tolist())

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
