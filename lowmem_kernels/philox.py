"""Philox-4x32-10, the counter-based random generator, in plain torch.

It specifies the random projections that kernels draw with `tl.philox`: both give the same bits, so a projection is
known from its seed and the position of an element, on any device. Reference: Salmon et al., Parallel random numbers: as
easy as 1, 2, 3 (SC 2011).
"""

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW_32 = 0xFFFFFFFF


def philox4x32(
    seed: int, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw four independent 32-bit words for each counter (c0, c1, c2, c3) under a 64-bit seed.

    Each of 10 rounds maps (c0, c1, c2, c3) to (hi(B c2) ^ c1 ^ k0, lo(B c2), hi(A c0) ^ c3 ^ k1, lo(A c0)), then steps
    the key (k0, k1), which starts as the low and the high word of the seed.

    seed: [-2**63, 2**64), negative seeds in two's complement.
    c0, c1, c2, c3: integer tensors on one device, or ints; broadcast together and taken modulo 2**32.
    Returns four int64 tensors of the broadcast shape with values in [0, 2**32).
    Equal to `tl.philox(seed, c0, c1, c2, c3)` for 32-bit counters; with 64-bit counters Triton draws Philox-4x64.
    Raises ValueError if the seed has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"a Philox seed has at most 64 bits, got {seed}")
    counters = (c0, c1, c2, c3)
    device = next((c.device for c in counters if isinstance(c, Tensor)), None)
    words = (torch.as_tensor(c, dtype=torch.int64, device=device) & _LOW_32 for c in counters)
    x0, x1, x2, x3 = torch.broadcast_tensors(*words)
    k0, k1 = seed & _LOW_32, seed >> 32 & _LOW_32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], x0)
        high1, low1 = _multiply(_MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW_32, (k1 + _KEY_STEPS[1]) & _LOW_32
    return x0, x1, x2, x3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 by 32 bit product, in two steps of 48 bits because the whole overflows int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
