"""What checks of the kernels share: cases, comparisons, byte counts. Used by the tests, the benchmarks and self-checks.

The modules that need Triton (`interpreter`, `bytecount`, ...) are imported by their own names.
"""

from .cases import DTYPES, PRECISIONS, SHAPES, Case, Precision, bytes_moved, make_tensors
from .compare import assert_parity, assert_rounded, assert_same_bits, ulp

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
    "make_tensors",
    "ulp",
]
