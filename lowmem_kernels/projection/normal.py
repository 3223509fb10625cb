"""Standard normal numbers from random words, by arithmetic that gives the same bits on every device.

Box and Muller's two numbers of two words are ``sqrt(-2 ln u) cos 2 pi v`` and ``sqrt(-2 ln u) sin 2 pi v``. Libraries
differ in the last digits of logarithms and cosines, so these are polynomials here: additions, multiplications, a
division and a root, each rounded to nearest, in one order. kernels/draw.py does the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The upper 24 bits of a word are a number of [0, 1), and with half a unit more one of (0, 1].
UNIT, HALF_UNIT = 2.0**-24, 2.0**-25

#: Bits of the fp32 number sqrt(1/2).
ROOT_HALF = 0x3F3504F3
LN_2, HALF_PI = math.log(2), math.pi / 2

#: ln((1 + f) / (1 - f)) = 2 (f + f**3 / 3 + ...) for f up to 0.172; the next term would be 2e-9 of the first.
LOG = (1 / 3, 1 / 5, 1 / 7, 1 / 9)

#: Coefficients beyond those of order 2 and 1, up to pi / 4: the next terms would be 2.5e-8 and 2e-9.
COS = (1 / 24, -1 / 720, 1 / 40320)
SIN = (-1 / 6, 1 / 120, -1 / 5040, 1 / 362880)


def normals(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two standard normal numbers, fp32, for each two words (int64 in [0, 2**32)); at most 5.9 in size."""
    # by way of fp64: torch's root of fp32 is not always the nearest number
    radius = (-2.0 * _logarithm((first >> 8).float() * UNIT + HALF_UNIT)).double().sqrt().float()
    cos, sin = _cosine_and_sine((second >> 8).float() * UNIT)
    return radius * cos, radius * sin


def _logarithm(x: Tensor) -> Tensor:
    shifted = x.view(torch.int32) - ROOT_HALF
    exponent = shifted >> 23
    mantissa = ((shifted & 0x7FFFFF) + ROOT_HALF).view(torch.float32)
    f = (mantissa - 1.0) / (mantissa + 1.0)
    s = f * f
    series = ((s * LOG[3] + LOG[2]) * s + LOG[1]) * s + LOG[0]
    return exponent.float() * LN_2 + (f * s * series + f) * 2.0


def _cosine_and_sine(turns: Tensor) -> tuple[Tensor, Tensor]:
    quarters = (turns * 4.0 + 0.5).int()
    x = (turns * 4.0 - quarters.float()) * HALF_PI
    s = x * x
    cos = (((s * COS[2] + COS[1]) * s + COS[0]) * s - 0.5) * s + 1.0
    sin = (((s * SIN[3] + SIN[2]) * s + SIN[1]) * s + SIN[0]) * s * x + x
    odd, upper = quarters & 1 == 1, quarters & 2 == 2
    c, s = torch.where(odd, -sin, cos), torch.where(odd, cos, sin)
    return torch.where(upper, -c, c), torch.where(upper, -s, s)
