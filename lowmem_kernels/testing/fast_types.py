"""Types of triton.language as one object each in the interpreter, told apart by their ids; and their tensors."""

from collections.abc import Hashable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.core import block_type, constexpr, pointer_type, tensor
from triton.runtime.interpreter import TensorHandle

_triton_block_type = block_type.__init__
_triton_pointer_type = pointer_type.__init__

SIGNED = {id(kind) for kind in (tl.int32, tl.int64)}
INTEGERS = SIGNED | {id(kind) for kind in (tl.uint32, tl.uint64)}
FLOATS = {id(kind) for kind in (tl.float16, tl.float32, tl.float64)}
#: Scalar types whose operations NumPy has: not bf16, which the interpreter keeps as integers.
PLAIN = INTEGERS | FLOATS | {id(tl.int1)}


def install_types() -> None:
    """Patch triton.language so that equal types are one object, and that tensors take their shape from it."""
    for kind, make in ((block_type, _one_block_type), (pointer_type, _one_pointer_type)):
        kind.__new__, kind.__init__, kind.__hash__ = make, _nothing, object.__hash__
    tensor.__init__ = _set_tensor


_types: dict[Hashable, Any] = {}


def _nothing(kind: Any, *_: Any, **__: Any) -> None:
    """Stand-in for the constructors of types, which come as they are out of `__new__`."""


def _one_block_type(cls: type, element_ty: Any, shape: Any) -> Any:
    key = (_name(element_ty), *[size.value if size.__class__ is constexpr else size for size in shape])
    if key not in _types:
        kind: Any = object.__new__(cls)
        _triton_block_type(kind, element_ty, list(shape))
        kind.known_shape = _shape(tuple(kind.shape))
        _types[key] = kind
    return _types[key]


def _one_pointer_type(cls: type, element_ty: Any, address_space: int = 1, const: bool = False) -> Any:
    key = (_name(getattr(element_ty, "value", element_ty)), "*", address_space, const)
    if key not in _types:
        kind: Any = object.__new__(cls)
        _triton_pointer_type(kind, element_ty, address_space, const)
        _types[key] = kind
    return _types[key]


def _name(element_ty: Any) -> Hashable:
    """What tells a type from others; a pointer's name does not say everything."""
    return id(element_ty) if element_ty.__class__ is pointer_type else element_ty.name


def _shape(sizes: tuple[int, ...]) -> tuple[Any, constexpr]:
    """What a tensor's shape and numel are."""
    return tl.core.tuple([constexpr(size) for size in sizes]), constexpr(int(np.prod(sizes)))


_NO_SHAPE = _shape(())


def _set_tensor(result: Any, handle: Any, kind: Any) -> None:
    """Stand-in for `tensor.__init__`."""
    result.handle, result.type = handle, kind
    result.dtype = kind.scalar
    result.shape, result.numel = kind.known_shape if kind.__class__ is block_type else _NO_SHAPE


def made(data: np.ndarray, kind: Any) -> Any:
    """A tensor of a type that has its id for ever."""
    handle = object.__new__(TensorHandle)
    result = object.__new__(tensor)
    result.handle, result.type = handle, kind
    if kind.__class__ is block_type:
        result.dtype = scalar = kind.element_ty
        result.shape, result.numel = kind.known_shape
    else:
        result.dtype = scalar = kind
        result.shape, result.numel = _NO_SHAPE
    handle.data, handle.dtype, handle.attr = data, scalar, {}
    return result


def lasts(kind: Any) -> bool:
    """Whether no other type will ever have its id."""
    return kind.__class__ in (block_type, pointer_type) or id(kind) in PLAIN
