"""What the specializations of all families share: names of dtypes and layouts, and the case that a signature makes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import triton.language as tl
from triton.runtime import JITFunction

from ..table import Layout
from .aot import CompileCase

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
LAYOUTS = {"aligned": Layout(True, False), "misaligned": Layout(False, False), "strided": Layout(False, True)}


def case_of(
    name: str,
    kernel: JITFunction,
    signature: Mapping[str, str | None],
    constexprs: Mapping[str, Any],
    options: Mapping[str, Any],
    divisible: Collection[str] = (),
) -> CompileCase:
    """Return the case of those arguments that the kernel takes.

    Args:
        name: of the case.
        kernel: decorated with `@triton.jit`.
        signature: type of each argument at run time, None for one that is absent.
        constexprs: values at compile time.
        options: of the compiler, but for the fusion of floating-point operations, which is off.
        divisible: arguments that are multiples of 16, besides the pointers.
    """
    present = {key: kind for key, kind in signature.items() if kind and key in kernel.arg_names}
    values = {**constexprs, **{key: None for key, kind in signature.items() if kind is None}}
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=present,
        constexprs={key: value for key, value in values.items() if key in kernel.arg_names},
        divisible_by_16=tuple(key for key, kind in present.items() if kind.startswith("*") or key in divisible),
        options={**options, "enable_fp_fusion": False},
    )
