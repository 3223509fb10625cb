"""The dtype policy: what may be a parameter, in what it is computed, how it is rounded, how close two runs must be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Parameter and gradient dtypes. float64 is absent on purpose: fp32 arithmetic would silently lose its digits.
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Dtypes whose rounding can be stochastic: the upper half of a float32, so the noise is added to the lower half.
STOCHASTIC_DTYPES = (torch.bfloat16,)

#: Spacing of float32 just below 1: the unit in which rounding errors of fp32 arithmetic are counted.
FP32_EPS = 2.0**-24


def name_of(dtype: torch.dtype) -> str:
    """Return the dtype without torch's prefix, as error messages and tables print it."""
    return str(dtype).removeprefix("torch.")


def rounds_stochastically(dtype: torch.dtype, stochastic_rounding: bool | None) -> bool:
    """Say whether a tensor of ``dtype`` is written with stochastic rounding.

    ``None`` means: on for bfloat16, off otherwise. ``True`` is legal for bfloat16 and for float32 (which needs no
    rounding, so nothing happens) and raises ValueError for float16, whose subnormals the noise would bias.
    """
    if stochastic_rounding and dtype is torch.float16:
        raise ValueError(
            "stochastic_rounding=True is not available for float16; allowed: bfloat16, float32 (no effect)"
        )
    return dtype in STOCHASTIC_DTYPES and stochastic_rounding is not False


def parity_tolerance(start: Tensor, end: Tensor, steps: int) -> float:
    """Return how far apart, in Frobenius norm, two correct fp32 runs of ``steps`` steps may end.

    ``2e-6 * |end - start| + 4 * 2**-24 * sqrt(steps) * |end|``: the first term allows another order of operations in
    the update, the second the rounding of every write as a random walk.
    """
    moved = torch.linalg.vector_norm(end.double() - start.double()).item()
    size = torch.linalg.vector_norm(end.double()).item()
    return 2e-6 * moved + 4 * FP32_EPS * math.sqrt(steps) * size
