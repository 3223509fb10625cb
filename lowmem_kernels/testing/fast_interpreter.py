"""Make Triton's interpreter faster, with the same bits: less Python between a line of a kernel and NumPy's operation.

Seen in 3.7.1: an operation on a small tile takes 50 microseconds, of which NumPy has 2. The rest finds out, every time
anew, what the operands' types mean. Here that is done once for each operator and types of operands, by Triton's own
code, whose result says what the types mean and has to have the bits of the short way; where it has not, or where
operands are of another kind than those below, Triton's code is called as ever.
"""

from collections.abc import Callable, Hashable
from functools import cache, lru_cache
from inspect import ismodule
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.core import block_type, constexpr, pointer_type, tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, TensorHandle

from .fast_types import FLOATS, INTEGERS, PLAIN, SIGNED, install_types, lasts, made

_builder = interpreter.interpreter_builder
_semantic = interpreter.interpreter_semantic
_triton_prepared = interpreter._patch_lang
_triton_launch = GridExecutor.__call__

_SMALLEST_FP32, _LARGEST_FP32 = 2.0**-126, (2 - 2**-23) * 2.0**127
#: Numbers that kernels count with make plans of their own; these are forgotten when there are too many.
_MOST_PLANS = 1 << 14


def install_fast_operations() -> None:
    """Patch Triton's interpreter as this module says. Call it before kernels run; it stays for the process."""
    install_types()
    interpreter._patch_attr = _bind
    interpreter._patch_lang = _prepare
    GridExecutor.__call__ = _launch


# ----- launches: what an operation is called as, and what is patched for a launch


def _bind(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Stand-in for `_patch_attr`, by which a launch makes a builtin of triton.language what a kernel can call."""
    scope.set_attr(obj, name, _bound(obj is tensor, name, member))


@cache
def _bound(of_tensor: bool, name: str, member: Any) -> Callable[..., Any]:
    # what Triton's decorator adds is the question whether there is a _semantic
    function = getattr(member, "__wrapped__", member)

    def triton_operation(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = _semantic
        return function(*args, **kwargs)

    if name in (_OF_TENSORS if of_tensor else _FUNCTIONS):
        return _planned(triton_operation, (_OF_TENSORS if of_tensor else _FUNCTIONS)[name])
    if name == "load" and not of_tensor:
        return _load_by(triton_operation)
    if name == "store" and not of_tensor:
        return _store_by(triton_operation)
    if name in ("cast", "to"):
        return _cast_by(triton_operation)
    if name == "__getitem__" and of_tensor:
        return _expanded_by(triton_operation)
    return triton_operation


_patched: dict[Hashable, list[tuple[Any, str, Any]]] = {}


def _prepare(function: Any) -> Any:
    """Stand-in for `_patch_lang`: what it looks up in triton.language is the same for each launch.

    That is, for the same modules that a function sees, of which some may have been patched already.
    """
    modules = [value for value in function.__globals__.values() if ismodule(value) and value in (tl, tl.core)]
    already = [not tl.core.is_builtin(member) for member in (tl.full, tl.core.full, tensor.__add__)]
    key = (*map(id, modules), *already)
    if key not in _patched:
        scope = _triton_prepared(function)
        _patched[key] = [(obj, name, obj.__dict__[name]) for obj, name, _ in scope._changes]
        return scope
    scope = interpreter._LangPatchScope()
    for obj, name, member in _patched[key]:
        scope.set_attr(obj, name, member)
    return scope


def _launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
    """Stand-in for `GridExecutor.__call__`. NumPy warns of what kernels compute and do not select."""
    with np.errstate(all="ignore"):
        _triton_launch(executor, *args, **kwargs)


# ----- elementwise operations


def _idiv(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x - np.fmod(x, y)) // y


_BINARY: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.divide,
    "floordiv": _idiv,
    "mod": np.fmod,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
}
_COMPARISONS: dict[str, Callable[..., np.ndarray]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_OF_TENSORS: dict[str, Callable[..., np.ndarray]] = {
    **{f"__{name}__": compute for name, compute in {**_BINARY, **_COMPARISONS}.items()},
    **{f"__r{name}__": lambda x, y, compute=compute: compute(y, x) for name, compute in _BINARY.items()},
}
_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "minimum": np.minimum,
    "maximum": np.maximum,
    "where": np.where,
}


def _planned(triton_operation: Callable[..., Any], compute: Callable[..., np.ndarray]) -> Callable[..., Any]:
    """An operation that computes what ``compute`` says where Triton's does that, see `_plan`."""
    plans: dict[Hashable, Any] = {}

    def operation(*operands: Any, **options: Any) -> Any:
        key = tuple([id(x.type) if x.__class__ is tensor else _number_key(x) for x in operands])
        plan = plans.get(key)
        if plan is None:
            result = triton_operation(*operands, **options)
            if len(plans) > _MOST_PLANS:
                plans.clear()
            if all(x.__class__ is not tensor or lasts(x.type) for x in operands):
                plans[key] = _plan(compute, operands, result)
            return result
        kind, function, constants = plan
        if kind is None:
            return triton_operation(*operands, **options)
        data = [x.handle.data if c is None else c for x, c in zip(operands, constants, strict=True)]
        return made(function(*data), kind)

    return operation


def _value(x: Any) -> Any:
    return x.value if x.__class__ is constexpr else x


def _number_key(x: Any) -> Hashable:
    """What tells an operand that is no tensor from others: 1, 1.0 and True are equal, NaN is not."""
    value = _value(x)
    return value.__class__, value if value == value else "NaN"


_TRITONS_WAY = (None, None, None)


def _plan(compute: Callable[..., np.ndarray], operands: tuple[Any, ...], result: Any) -> tuple[Any, Any, Any]:
    """(type of the result, function of arrays, arrays in place of the operands that are numbers), or Triton's way."""
    tensors = [x for x in operands if x.__class__ is tensor]
    scalar = tensors[-1].dtype if tensors else None
    if scalar is None or result.__class__ is not tensor or not lasts(result.type):
        return _TRITONS_WAY
    kinds = [x.dtype for x in tensors]
    if compute is np.where:
        if operands[0].__class__ is not tensor or kinds.pop(0) is not tl.int1 or not kinds:
            return _TRITONS_WAY
        scalar = kinds[-1]
    if operands[0].__class__ is tensor and operands[0].dtype.__class__ is pointer_type:
        pointed = operands[0].dtype.element_ty
        offset = tl.int64 if operands[1].__class__ is not tensor else kinds[-1]
        if compute is not np.add or id(offset) not in SIGNED or id(pointed) not in PLAIN | {id(tl.bfloat16)}:
            return _TRITONS_WAY
        scalar, compute = offset, _moved_by(max(1, pointed.primitive_bitwidth // 8))
    elif any(kind is not scalar for kind in kinds):
        scalar = _common(kinds)
        if scalar is None or compute is np.where:
            return _TRITONS_WAY
        compute = _converted(compute, interpreter._get_np_dtype(scalar))
    elif id(scalar) not in PLAIN:
        return _TRITONS_WAY
    constants: list[np.ndarray | None] = []
    for x in operands:
        if x.__class__ is tensor:
            constants.append(None)
        elif _is_number_of(_value(x), scalar):
            # to Triton -0.0 is 0
            constants.append(np.array([_value(x) or 0], dtype=interpreter._get_np_dtype(scalar)))
        else:
            return _TRITONS_WAY
    data = compute(*[x.handle.data if c is None else c for x, c in zip(operands, constants, strict=True)])
    expected = result.handle.data
    if (data.dtype, data.shape) != (expected.dtype, expected.shape) or data.tobytes() != expected.tobytes():
        return _TRITONS_WAY
    return result.type, compute, constants


def _common(kinds: list[Any]) -> Any:
    """The type that operands of several types are converted to, where none is unsigned."""
    wide = [kind for kind in (tl.float32, tl.int64) if kind in kinds]
    return wide[0] if wide and all(kind in (wide[0], tl.int32, tl.int64) for kind in kinds) else None


def _converted(compute: Callable[..., np.ndarray], dtype: Any) -> Callable[..., np.ndarray]:
    return lambda x, y: compute(x.astype(dtype, copy=False), y.astype(dtype, copy=False))


def _moved_by(size: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Addition of offsets to pointers to elements of ``size`` bytes."""
    width = np.uint64(size)
    return lambda pointers, offsets: pointers + width * offsets.astype(np.uint64)


def _is_number_of(x: Any, scalar: Any) -> bool:
    """Whether an operator takes a Python number for a number of the other operand's type, or of a narrower one."""
    if x.__class__ is int:
        if id(scalar) in SIGNED | FLOATS:
            return -(2**31) <= x < 2**31
        return id(scalar) in INTEGERS and 0 <= x < 2**32
    if x.__class__ is float:
        size = abs(x)
        in_fp32 = size in (0.0, np.inf) or size != size or _SMALLEST_FP32 <= size <= _LARGEST_FP32
        return id(scalar) in (id(tl.float32), id(tl.float64)) and in_fp32
    return False


# ----- casts and accesses


#: Conversions that are one of NumPy's: from, and to.
_CONVERSIONS = {
    **{(x, id(y)): np.dtype(y.name) for x in INTEGERS for y in (tl.int32, tl.int64, tl.uint32, tl.uint64)},
    **{(x, id(tl.float32)): np.dtype(np.float32) for x in INTEGERS | {id(tl.float16), id(tl.float64)}},
    **{(id(tl.float32), id(tl.float16)): np.dtype(np.float16), (id(tl.float32), id(tl.float64)): np.dtype(np.float64)},
}


def _expanded_by(triton_getitem: Callable[..., Any]) -> Callable[..., Any]:
    """x[:, None] and x[None, :] of a vector; all else is Triton's."""

    def operation(x: Any, slices: Any) -> Any:
        if x.__class__ is tensor and len(x.shape.values) == 1 and x.type.__class__ is block_type:
            (size,) = x.type.shape.values
            if slices == _COLUMN and lasts(x.dtype):
                return made(x.handle.data[:, None], block_type(x.dtype, (size, 1)))
            if slices == _ROW and lasts(x.dtype):
                return made(x.handle.data[None, :], block_type(x.dtype, (1, size)))
        return triton_getitem(x, slices)

    return operation


_COLUMN, _ROW = (slice(None), None), (None, slice(None))


def _cast_by(triton_cast: Callable[..., Any]) -> Callable[..., Any]:
    def operation(x: Any, dtype: Any, *args: Any, **options: Any) -> Any:
        if x.__class__ is tensor and not args and not options:
            if x.dtype is dtype:
                return x
            converted = _CONVERSIONS.get((id(x.dtype), id(dtype)))
            if converted is not None:
                return made(x.handle.data.astype(converted), _like(x.type, dtype))
        return triton_cast(x, dtype, *args, **options)

    return operation


def _load_by(triton_load: Callable[..., Any]) -> Callable[..., Any]:
    """tl.load of pointers with a mask of their shape and a number elsewhere; all else is Triton's."""

    @lru_cache(maxsize=None, typed=True)
    def filling(kind: Any, number: float) -> TensorHandle:
        filled = _semantic.to_tensor(number)
        if kind.__class__ is block_type:
            filled = _semantic.broadcast_impl_shape(filled, kind.shape)
        return _semantic.cast(filled, kind.scalar.element_ty).handle

    def operation(pointer: Any, mask: Any = None, other: Any = None, **options: Any) -> Any:
        kind = pointer.type
        scalar = kind.scalar
        if scalar.__class__ is pointer_type and id(scalar.element_ty) in _LOADED and _known(options):
            result_type = _like(kind, scalar.element_ty)
            modifiers = (_cache_modifier(options.get("cache_modifier", "")), _no_eviction, False)
            if mask is None and other is None:
                if kind.__class__ is block_type:
                    return tensor(_builder.create_load(pointer.handle, *modifiers), result_type)
                filled = filling(kind, 0)
                return tensor(_builder.create_masked_load(pointer.handle, _TRUE, filled, *modifiers), result_type)
            if _is_mask_of(mask, kind) and other.__class__ in (int, float) and other == other:
                filled = filling(kind, other)
                return tensor(_builder.create_masked_load(pointer.handle, mask.handle, filled, *modifiers), result_type)
        return triton_load(pointer, mask, other, **options)

    return operation


def _store_by(triton_store: Callable[..., Any]) -> Callable[..., Any]:
    """tl.store of values of the pointers' shape, with a mask of that shape; all else is Triton's."""

    def operation(pointer: Any, value: Any, mask: Any = None, **options: Any) -> Any:
        kind = pointer.type
        scalar = kind.scalar
        if (
            scalar.__class__ is pointer_type
            and id(scalar.element_ty) in _LOADED
            and not scalar.const
            and not options
            and value.__class__ is tensor
            and _same_shape(value.type, kind)
            and (mask is None or _is_mask_of(mask, kind))
        ):
            handle = _semantic.cast(value, scalar.element_ty).handle
            if mask is None:
                _builder.create_store(pointer.handle, handle, _no_modifier, _no_eviction)
            else:
                _builder.create_masked_store(pointer.handle, handle, mask.handle, _no_modifier, _no_eviction)
            return None
        return triton_store(pointer, value, mask, **options)

    return operation


_TRUE = TensorHandle(np.array([True]), tl.int1)
_LOADED = PLAIN - {id(tl.int1)} | {id(tl.bfloat16)}
_cache_modifier = cache(_semantic._str_to_load_cache_modifier)
_no_modifier = _semantic._str_to_store_cache_modifier("")
_no_eviction = _semantic._str_to_eviction_policy("")


def _like(kind: Any, scalar: Any) -> Any:
    """The type of other elements in the shape of ``kind``."""
    return block_type(scalar, kind.shape.values) if kind.__class__ is block_type else scalar


def _known(options: dict[str, Any]) -> bool:
    return not options or (len(options) == 1 and options.get("cache_modifier").__class__ is str)


def _is_mask_of(mask: Any, kind: Any) -> bool:
    return mask.__class__ is tensor and mask.dtype is tl.int1 and _same_shape(mask.type, kind)


def _same_shape(x: Any, y: Any) -> bool:
    """Whether two types have the same shape."""
    if x.__class__ is block_type and y.__class__ is block_type:
        return x.shape.values == y.shape.values
    return x.__class__ is not block_type and y.__class__ is not block_type
