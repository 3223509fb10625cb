"""What checks of the kernels share: cases, comparisons, byte counts. Used by the tests, the benchmarks and self-checks.

The modules that need Triton (`interpreter`, `bytecount`, ...) are imported by their own names, and by `compile_cases`
when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cases import DTYPES, PRECISIONS, SHAPES, Case, Precision, bytes_moved, cached_bytes, make_tensors, moment_bytes
from .compare import assert_parity, assert_rounded, assert_same_bits, ulp

if TYPE_CHECKING:
    from .aot import CompileCase

__all__ = [
    "DTYPES",
    "PRECISIONS",
    "SHAPES",
    "Case",
    "Precision",
    "assert_parity",
    "assert_rounded",
    "assert_same_bits",
    "bytes_moved",
    "cached_bytes",
    "compile_cases",
    "make_tensors",
    "moment_bytes",
    "ulp",
]


def compile_cases(warp_size: int = 32) -> list[CompileCase]:
    """Return the representative specializations of every kernel, for targets with warps of ``warp_size`` lanes."""
    from . import specializations

    return specializations.compile_cases(warp_size)
