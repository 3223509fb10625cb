"""Fragments by themselves, where a rule would hide their errors."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import oracles
from lowmem_kernels.fragments import one_minus_power, rounded, rounding_noise, transformed
from lowmem_kernels.rounding import noise, stream_key, tensor_key
from lowmem_kernels.testing import assert_same_bits

LANES = 64
CPU = torch.device("cpu")


@triton.jit
def _noise_kernel(out_ptr, key_ptr, start_ptr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    values = rounding_noise(tl.load(key_ptr).to(tl.uint32), tl.load(start_ptr), lane)
    tl.store(out_ptr + lane, values.to(tl.int32))


@triton.jit
def _power_kernel(out_ptr, log_base_ptr, exponent_ptr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    tl.store(out_ptr + lane, one_minus_power(tl.load(log_base_ptr + lane), tl.load(exponent_ptr + lane)))


@triton.jit
def _rounded_kernel(out_ptr, x_ptr, key_ptr, STOCHASTIC: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    key = tl.load(key_ptr).to(tl.uint32)
    tl.store(out_ptr + lane, rounded(tl.load(x_ptr + lane), key, 0, lane, tl.bfloat16, STOCHASTIC))


@triton.jit
def _transformed_kernel(
    g_ptr, usable_ptr, x_ptr, scale, clip_value, clip_coef, SKIP: tl.constexpr, LANES: tl.constexpr
):
    lane = tl.arange(0, LANES)
    g, usable = transformed(tl.load(x_ptr + lane), (scale, clip_value, clip_coef), SKIP)
    tl.store(g_ptr + lane, g)
    tl.store(usable_ptr + lane, usable.to(tl.int32))


@pytest.mark.parametrize("start", [0, 64, 2**31, 2**32 - 64, 2**33 - 64, 2**33, 2**33 + 8, 5 * 2**33 + 2048, 2**40])
@pytest.mark.parametrize(("seed", "uid", "step", "stream"), [(0, 0, 1, 0), (-1, 2**63 - 1, 999_983, 2)])
def test_noise_of_the_kernel(start, seed, uid, step, stream):
    key = stream_key(tensor_key(seed, uid), step, stream)
    out = torch.full((LANES,), -1, dtype=torch.int32)
    _noise_kernel[(1,)](out, torch.tensor([key]), torch.tensor([start]), LANES)
    assert out.tolist() == noise(key, start, LANES, CPU).tolist()
    assert out.tolist() == oracles.noise(seed, uid, step, stream, range(start, start + LANES)).tolist()


def test_one_minus_power():
    """1 - beta**step over the whole range of both, to 3 units of 2**-24 of itself.

    Four roundings of at most a unit each: the stored log, exponent * log, the last step of the series (or the
    subtraction of exp), the last product; they never all add up (2.1 units seen). Two terms less of the series make
    3.3 units, subtracting where the series is needed 5.5.
    """
    betas = [1e-3, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999, 1 - 2.0**-24, 1 - 1e-9]
    steps = [1, 2, 3, 5, 6, 7, 10, 68, 69, 70, 100, 692, 693, 694, 1000, 6931, 6932, 10**5, 10**6, 2**24]
    grid = [(math.log(beta), step) for beta in betas for step in steps]
    grid += [(-0.01 * k - 0.0001, 1) for k in range(1, 100)]
    size = 1 << (len(grid) - 1).bit_length()
    grid += [grid[0]] * (size - len(grid))
    logs, exponents = (torch.tensor(column, dtype=torch.float64).float() for column in zip(*grid, strict=True))
    out = torch.full((size,), torch.nan)
    with np.errstate(over="ignore"):  # of the series where it is not used
        _power_kernel[(1,)](out, logs, exponents, size)
    exact = np.array([-math.expm1(step * log) for log, step in grid])
    units = np.abs(out.double().numpy() - exact) / exact * 2**24
    assert units.max() <= 3, f"{units.max():.2f} units at (log base, exponent) {grid[units.argmax()]}"


def test_one_minus_power_of_zero_is_one():
    out = torch.full((2,), torch.nan)
    _power_kernel[(1,)](out, torch.full((2,), -math.inf), torch.tensor([1.0, 1e6]), 2)
    assert out.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("stochastic", [False, True])
def test_rounded(stochastic):
    """All kinds of fp32 bits: as the oracle rounds them, NaN payloads that noise would carry into a number included."""
    bits = torch.randint(-(2**31), 2**31, (1 << 14,), dtype=torch.int64).to(torch.int32)
    special = [0x7FFFFFFF, 0x7F800001, 0x7F800000, -(2**31), 0, 1, 0x7F7FFFFF, 0x3F808000, 0x3F818000, -1]
    bits[: len(special)] = torch.tensor(special, dtype=torch.int32)
    values = bits.view(torch.float32)
    out = torch.full(values.shape, 7.0, dtype=torch.bfloat16)
    key = stream_key(tensor_key(1, 2), 3, 1)
    _rounded_kernel[(1,)](out, values, torch.tensor([key]), stochastic, len(values))
    with np.errstate(over="ignore", invalid="ignore"):
        if stochastic:
            expected = oracles.to_bf16_stochastic(values.numpy(), oracles.noise(1, 2, 3, 1, range(len(values))))
        else:
            expected = oracles.to_bf16(values.numpy()).astype(np.float32)
    assert_same_bits(out.float(), torch.from_numpy(expected))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("clip_value", [None, 2.0])
def test_transformed_nan_and_inf(clip_value, skip):
    """Clamping lets NaN through; an infinity that clamping would hide is still not usable."""
    x = torch.tensor([1.0, -8.0, torch.nan, torch.inf, -torch.inf, 3e38, 0.0, -0.0])
    g, usable = torch.zeros(8), torch.full((8,), -1, dtype=torch.int32)
    with np.errstate(over="ignore"):  # of 3e38 * 2, on purpose
        _transformed_kernel[(1,)](g, usable, x, -2.0, clip_value, 0.5, skip, 8)
    expected, finite = oracles.transformed(x.double().numpy(), 2.0, clip_value, 0.5, maximize=True)
    expected = torch.from_numpy(expected)
    if clip_value is None:
        expected[5] = -torch.inf  # 6e38 does not exist in fp32
    assert_same_bits(g.double(), expected)
    assert usable.tolist() == (finite.astype(int).tolist() if skip else [1] * 8)
