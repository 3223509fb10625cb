"""Names for profilers: every call of a verb inside a range that says which verb, and over what shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor

from .numerics import name_of

Enter = Callable[[str], AbstractContextManager[Any]]

_enter: Enter | None = None


@contextmanager
def named_ranges(enter: Enter) -> Iterator[None]:
    """Run every verb called in this block inside ``enter(name)``, as in ``named_ranges(torch.cuda.nvtx.range)``.

    The name is that of `range_name`. Outside of such a block a verb pays for one comparison.
    """
    global _enter
    former, _enter = _enter, enter
    try:
        yield
    finally:
        _enter = former


def range_name(verb: str, tensors: Sequence[Tensor]) -> str:
    """Return a verb's name, dtype and shape classes: "adamw_ bfloat16 64 of 4096x4096, 2 of 32000x4096, 65 vectors".

    Matrices come by falling number of elements of their class; what has fewer than two dimensions is a vector. There
    are no colons or quotes in it, which profilers use to separate names.
    """
    matrices = Counter(tuple(tensor.shape) for tensor in tensors if tensor.ndim >= 2)
    vectors = len(tensors) - matrices.total()
    numel = {tuple(tensor.shape): tensor.numel() for tensor in tensors}
    classes = sorted(matrices, key=lambda shape: (-matrices[shape] * numel[shape], shape))
    parts = [f"{matrices[shape]} of {'x'.join(map(str, shape))}" for shape in classes]
    parts += [f"{vectors} vector{'s' * (vectors > 1)}"] if vectors else []
    return f"{verb} {name_of(tensors[0].dtype)} {', '.join(parts)}" if tensors else verb


def named(implementation: ModuleType) -> Any:
    """Return the module, whose functions run in ranges while somebody wants them."""
    return implementation if _enter is None else _Named(implementation, _enter)


class _Named:
    """A module whose functions enter a range named after their first argument, a list of tensors."""

    def __init__(self, implementation: ModuleType, enter: Enter) -> None:
        self._implementation, self._enter = implementation, enter

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        function = getattr(self._implementation, verb)

        def in_range(tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
            with self._enter(range_name(verb, tensors)):
                return function(tensors, *args, **kwargs)

        return in_range
