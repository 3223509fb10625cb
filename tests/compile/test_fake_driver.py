"""The fake driver: what it records, what it compiles, and that it leaves nothing behind."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from lowmem_kernels.testing.aot import TARGETS, inspect_kernel
from lowmem_kernels.testing.fake_driver import Launch, fake_driver


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)


@triton.jit
def _center_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x - tl.max(x))


@pytest.mark.parametrize("target_name", TARGETS)
def test_fake_driver_counts_launches(target_name: str) -> None:
    x, y = torch.ones(2048), torch.zeros(2048)
    with fake_driver(target_name) as gpu:
        _copy_kernel[(2,)](x, y, 2048, BLOCK=1024)
        _copy_kernel[lambda meta: (triton.cdiv(2000, meta["BLOCK"]), 3)](x, y, 2000, BLOCK=1024)
        _center_kernel[(1,)](x, y, BLOCK=64)
        assert gpu.launches == [
            Launch("_copy_kernel", (2, 1, 1)),
            Launch("_copy_kernel", (2, 3, 1)),
            Launch("_center_kernel", (1, 1, 1)),
        ]
    assert gpu.count_launches() == 3
    assert gpu.count_launches("_copy_kernel") == 2
    assert gpu.count_launches("_other_kernel") == 0
    assert not y.any()


def test_fake_driver_specializes_on_real_arguments() -> None:
    x, y = torch.ones(2048), torch.zeros(2048)
    with fake_driver() as gpu:
        assert gpu.count_variants(_copy_kernel) == 0
        wide = _copy_kernel[(2,)](x, y, 2048, BLOCK=1024)
        assert inspect_kernel(wide, "sm_90").widest == 128
        _copy_kernel[(2,)](y, x, 1024, BLOCK=1024)
        assert gpu.count_variants(_copy_kernel) == 1
        narrow = _copy_kernel[(2,)](x[1:], y[1:], 2047, BLOCK=1024)
        assert inspect_kernel(narrow, "sm_90").widest == 32
        assert gpu.count_variants(_copy_kernel) == 2


def test_fake_drivers_nest_and_restore() -> None:
    x = torch.ones(64)
    former, devices = driver._active, list(_center_kernel.device_caches)
    with fake_driver("sm_80") as outer:
        compiled = _center_kernel[(1,)](x, x, BLOCK=64)
        assert compiled.metadata.target == TARGETS["sm_80"]
        with fake_driver("gfx942") as inner:
            compiled = _center_kernel[(1,)](x, x, BLOCK=64)
            assert compiled.metadata.target == TARGETS["gfx942"]
        assert driver.active is outer
        assert outer.count_variants(_center_kernel) == 1
        assert (inner.count_launches(), outer.count_launches()) == (1, 1)
    assert driver._active is former
    assert list(_center_kernel.device_caches) == devices


def test_fake_driver_restores_after_an_exception() -> None:
    x = torch.ones(64)
    former, devices = driver._active, list(_center_kernel.device_caches)

    def fail() -> None:
        with fake_driver():
            _center_kernel[(1,)](x, x, BLOCK=64)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert driver._active is former
    assert list(_center_kernel.device_caches) == devices
