"""Lists of tensors that verbs are given again and again, and what has been found out about them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import is_
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Tensors(tuple[Any, ...]):
    """Tensors that stay as they are from call to call, so that verbs check them, and look up their addresses, once.

    Verbs take any sequence of tensors, and look at each of them in every call. Whoever hands over a `Tensors` again
    says that shape, strides, dtype, device and address of its tensors are what they were. The values may have changed.
    """

    memo: dict[Hashable, tuple[tuple[object, ...], Any]]

    def __new__(cls, tensors: Iterable[Tensor | None]) -> Tensors:
        """Make one of any iterable."""
        made = super().__new__(cls, tensors)
        made.memo = {}
        return made


class Gradients(list[Tensor]):
    """What autograd has left in ``.grad`` of a list of parameters, so that shapes fit, of known dtype and layout."""


def remembered(lists: Sequence[Sequence[Tensor | None] | None], what: Hashable, find: Callable[[], T]) -> T:
    """Return ``find()``, called once for the same lists and ``what`` if all of them are `Tensors` or None."""
    first, *others = lists
    if not isinstance(first, Tensors) or not all(x is None or isinstance(x, Tensors) for x in others):
        return find()
    known = first.memo.get(what)
    if known is None or len(known[0]) != len(others) or not all(map(is_, known[0], others)):
        known = first.memo[what] = (tuple(others), find())
    result: T = known[1]
    return result
