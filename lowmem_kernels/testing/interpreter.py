"""Make Triton's interpreter convert to and from bfloat16 and take numbers as GPUs do, and call functions faster."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from inspect import ismodule
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_triton_argument = interpreter._implicit_cvt
_scalar_dtype = cache(interpreter._get_np_dtype)
_triton_cast = InterpreterBuilder.cast_impl
_triton_call = InterpretedFunction.__call__


def install_round_to_nearest() -> None:
    """Patch Triton's interpreter so that conversions to bf16 round to nearest, ties to even.

    Seen in 3.6.0, 3.7.1 and 3.9.0: fp32 to bf16 truncates, explicitly or on a store. Seen in 3.7.1: subnormal bf16
    become wrong fp32, and integers and fp64 become meaningless bf16; these are repaired too, by way of fp32.
    NaN stays NaN, infinities stay infinite, and `fp_downcast_rounding="rtz"` still truncates.

    Call it before kernels run; a second call changes nothing. The patch stays for the life of the process: it is for
    tests and self-checks, and matters only under TRITON_INTERPRET=1.
    """
    InterpreterBuilder.cast_impl = _cast


def install_fast_calls() -> None:
    """Patch Triton's interpreter so that a call of one @triton.jit function by another takes microseconds.

    Seen in 3.7.1: each such call prepares triton.language anew for interpretation, 2 ms, although the kernel that it
    comes from has done so: two thirds of the time of a kernel made of many functions. Of the rest a fifth are sums and
    products of int32, done again in 64 bits and then not looked at, and a tenth is a dict of all dtypes, built anew
    wherever one is looked up. Call it before kernels run.
    """
    InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _np_dtype
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


def install_fp32_arguments() -> None:
    """Patch Triton's interpreter so that a float argument is a float32, as on GPUs.

    Seen in 3.7.1: it stays a Python number, in whose double precision 1e-30 has a square and 3e38 a double. Call it
    before kernels run.
    """
    interpreter._implicit_cvt = _argument


def install_approximate_roots() -> None:
    """Patch Triton's interpreter so that roots of fp32 take subnormal numbers for zeros, as on NVIDIA's GPUs.

    Seen in 3.7.1: tl.sqrt and tl.rsqrt are compiled to sqrt.approx.ftz and rsqrt.approx.ftz, where the latter makes Inf
    of 1e-40; NumPy makes 1e20. Call it before kernels run.
    """
    InterpreterBuilder.create_sqrt = lambda builder, x: _root(x, np.sqrt)
    InterpreterBuilder.create_rsqrt = lambda builder, x: _root(x, lambda values: 1 / np.sqrt(values))


def _root(x: TensorHandle, root: Callable[[Any], Any]) -> TensorHandle:
    """A root of ``x`` without its subnormal numbers; the rsqrt of 0 is Inf without a warning."""
    subnormal = (np.abs(x.data) < np.finfo(np.float32).tiny) & (x.data.dtype == np.float32)
    with np.errstate(divide="ignore"):
        return TensorHandle(root(np.where(subnormal, np.float32(0), x.data)), x.dtype.scalar)


def _argument(value: Any) -> Any:
    """Stand-in for `_implicit_cvt`, through which every argument that is no constexpr goes."""
    if isinstance(value, float):
        return tl.tensor(TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return _triton_argument(value)


def _call(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for `InterpretedFunction.__call__`, which a kernel's calls of other functions go to."""
    prepared = not any(tl.core.is_builtin(language.full) for language in _languages(function))
    return function.rewrite()(*args, **kwargs) if prepared else _triton_call(function, *args, **kwargs)


@cache
def _languages(function: InterpretedFunction) -> list[Any]:
    """What the function's module calls triton.language."""
    return [value for value in function.fn.__globals__.values() if ismodule(value) and value in (tl, tl.core)]


def _np_dtype(kind: Any) -> np.dtype[Any]:
    """Stand-in for `_get_np_dtype`."""
    pointer = isinstance(kind.scalar, tl.pointer_type)
    return np.dtype(np.uint64) if pointer else _scalar_dtype(kind.scalar)


def _cast(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    """Stand-in for `InterpreterBuilder.cast_impl`, through which every cast without a rounding mode goes."""
    if target.scalar == tl.bfloat16:
        return TensorHandle(_round_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
    if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
        return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return _triton_cast(builder, source, target)


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the bf16 nearest to each fp32 value: the upper half, plus one if the lower half asks for it."""
    bits = values.view(np.uint32)
    upper = bits >> 16
    round_up = (bits & 0xFFFF) + (upper & 1) > 0x8000
    # rounding up carries into the exponent, as it should, but would make an infinity or a zero of a NaN
    return np.where(np.isnan(values), np.uint16(0x7FC0), (upper + round_up).astype(np.uint16))
