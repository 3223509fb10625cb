"""How close kernels have to be to the reference, both of which compute in fp32 and round once."""

import torch

from lowmem_kernels.numerics import parity_tolerance
from lowmem_kernels.testing import assert_parity, ulp


def assert_close(actual, expected, start, steps, name, slack=1):
    """fp32 within the project's parity bound. Narrower dtypes within 16 units of 2**-24 of the largest old value (what
    cancels in a momentum), plus one spacing of their dtype where the fp32 results lie on two sides of a rounding
    boundary: each of ``steps`` roundings can move one element by one.

    Such elements are rare. The fp32 results are some 10 of their spacings apart, of 2**13 (fp16) or 2**16 (bf16) that
    lie between boundaries: at most 3 in 1000 for each step, where another noise or formula would move 1 of 3.

    ``slack``: how many times as far apart fp32 results may be.
    """
    if actual.dtype is torch.float32:
        error = torch.linalg.vector_norm(actual.double() - expected.double()).item()
        if not error <= slack * parity_tolerance(start, expected, steps):
            assert_parity(actual, expected, start, steps, name)
        return
    wrong = (actual != expected).sum().item()
    assert wrong <= 1 + slack * 0.003 * steps * actual.numel(), f"{name}: {wrong} of {actual.numel()} elements differ"
    largest = start.double().abs().max() if start.numel() else 0
    allowed = steps * ulp(expected, expected.dtype) + slack * 2.0**-20 * largest
    assert ((actual.double() - expected.double()).abs() <= allowed).all(), f"{name}: by more than {steps} spacings"
