"""The torch Philox against `tl.philox`, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl

from lowmem_kernels.philox import philox4x32


@triton.jit
def _philox_kernel(out_ptr, seed, row, N: tl.constexpr):
    offs = tl.arange(0, N)
    words = tl.philox(seed, offs, row + offs * 0, offs * 65537, offs * 0 - 1)
    for i in tl.static_range(4):
        tl.store(out_ptr + i * N + offs, words[i].to(tl.int64))


@pytest.mark.parametrize("seed", [0, 123, 2**31 - 1, 2**33 + 5])
def test_equals_triton(seed: int) -> None:
    out = torch.zeros(4, 128, dtype=torch.int64)
    _philox_kernel[(1,)](out, seed, 42, N=128)
    offs = torch.arange(128)
    assert torch.equal(out, torch.stack(philox4x32(seed, offs, 42, offs * 65537, -1)))
