"""Stochastic rounding: the torch noise is the documented hash bit for bit, and rounding with it is unbiased.

Statistics have fixed seeds and are judged at 4.5 standard errors: a correct generator fails each with p = 7e-6.
"""

import math

import numpy as np
import pytest
import torch

import oracles
from lowmem_kernels import Rounding
from lowmem_kernels.elementwise import scaled_update_
from lowmem_kernels.numerics import rounds_stochastically
from lowmem_kernels.rounding import noise, store_stochastic_, stream_key, tensor_key

CPU = torch.device("cpu")
LIMIT = 4.5
COUNT = 1 << 20
ULP = 2.0**-7  # of bfloat16 in [1, 2)


def reference_noise(seed, uid, step, stream, start, count):
    return noise(stream_key(tensor_key(seed, uid), step, stream), start, count, CPU)


def round_by_torch(values, key=12345, start=0):
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    store_stochastic_(target, values.clone(), key, start)
    return target


def z_of_chi_square(observed, expected):
    """Chi-square of counts as a normal deviate (Wilson and Hilferty)."""
    freedom = observed.size - 1
    chi_square = float(np.sum((observed - expected) ** 2 / expected))
    spread = 2 / (9 * freedom)
    return ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**33 + 5, -1])
@pytest.mark.parametrize("uid", [0, 1, -1, -(2**63), 2**63 - 1, 2**64 - 1, 0x123456789ABCDEF0])
@pytest.mark.parametrize(("step", "stream"), [(1, 0), (2, 1), (999_983, 2), (2**24, 1)])
def test_noise_is_the_documented_hash(seed, uid, step, stream):
    for start, count in ((0, 33), (1, 32), (7, 1), (4096, 2), (2**31 - 3, 9)):
        expected = oracles.noise(seed, uid, step, stream, range(start, start + count))
        actual = reference_noise(seed, uid, step, stream, start, count)
        assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("distance", [0, 1, 2, 5, 8, 9, 30, 31])
@pytest.mark.parametrize("boundary", [2**33, 3 * 2**33, 2**40])
def test_noise_across_the_high_word_of_the_pair_index(boundary, distance):
    start, count = boundary - distance, 31
    expected = oracles.noise(7, 8, 9, 1, range(start, start + count))
    assert reference_noise(7, 8, 9, 1, start, count).tolist() == expected.tolist()
    before = oracles.noise(7, 8, 9, 1, range(start - boundary + 2**33, start - boundary + 2**33 + count))
    assert boundary == 2**33 or before.tolist() != expected.tolist()


def test_noise_of_nothing_is_empty():
    assert reference_noise(1, 2, 3, 0, 5, 0).shape == (0,)


def test_keys_differ_in_every_part():
    parts = [(s, u, t, r) for s in (0, 1, 2**32) for u in (0, 1, -1, 2**32) for t in (1, 2) for r in (0, 1, 2)]
    assert len({stream_key(tensor_key(s, u), t, r) for s, u, t, r in parts}) == len(parts)


@pytest.mark.parametrize("shift", [0, 4, 8])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_noise_is_uniform(shift, step):
    buckets = (reference_noise(0, 0, step, 0, 0, COUNT).numpy() >> shift) & 0xFF
    observed = np.bincount(buckets, minlength=256)
    assert abs(z_of_chi_square(observed, COUNT / 256)) < LIMIT


@pytest.mark.parametrize("shift", [0, 12], ids=["low_bits", "high_bits"])
@pytest.mark.parametrize(
    "other",
    [
        pytest.param((0, 1, 0, 1), id="next_element"),
        pytest.param((0, 1, 0, 2), id="element_after_next"),
        pytest.param((0, 1, 0, 64), id="element_64_further"),
        pytest.param((0, 2, 0, 0), id="next_step"),
        pytest.param((1, 1, 0, 0), id="next_uid"),
        pytest.param((-1, 1, 0, 0), id="uid_before"),
        pytest.param((0, 1, 1, 0), id="next_stream"),
    ],
)
def test_pairs_of_noise_are_independent(other, shift):
    uid, step, stream, distance = other
    a = reference_noise(0, 0, 1, 0, 0, COUNT).numpy()
    b = reference_noise(0, uid, step, stream, distance, COUNT).numpy()
    observed = np.bincount(((a >> shift) & 15) * 16 + ((b >> shift) & 15), minlength=256)
    assert abs(z_of_chi_square(observed, COUNT / 256)) < LIMIT


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("part", [1, 6553, 32768, 58982, 65535])
def test_rounding_is_unbiased(part, sign):
    """A value at the fraction f of the way is rounded up with the probability f: the mean of roundings is f."""
    fraction = part / 65536
    values = torch.full((COUNT,), sign * (1 + fraction * ULP))
    ups = (round_by_torch(values).double().abs() - 1) / ULP
    assert set(ups.unique().tolist()) <= {0.0, 1.0}
    deviation = (ups.mean().item() - fraction) / math.sqrt(fraction * (1 - fraction) / COUNT)
    assert abs(deviation) < LIMIT


def test_error_over_steps_has_mean_0_and_variance_f_1_minus_f():
    """The same 512 elements rounded at 2000 steps: each element's errors over time are those of its own coin."""
    elements, steps = 512, 2000
    values = 1 + torch.rand(elements) * 0.99
    fraction = (values.view(torch.int32) & 0xFFFF).double() / 65536
    lower = (values.view(torch.int32) & ~0xFFFF).view(torch.float32).double()
    key = tensor_key(3, 4)
    ups = torch.stack([round_by_torch(values, stream_key(key, t, 0)) for t in range(1, steps + 1)])
    ups = (ups.double() - lower) / ULP
    variance = fraction * (1 - fraction)
    z = (ups.mean(0) - fraction) / (variance / steps).sqrt()
    # one of 512 normal deviates exceeds 5.5 with p = 2e-5; elements next to a boundary are not yet normal
    assert z[(fraction > 0.02) & (fraction < 0.98)].abs().max() < 5.5
    # the sum of squared errors over all is f(1-f) on average; (x - f)² of a coin has the variance f(1-f)(1-2f)²
    squares = ((ups - fraction) ** 2).sum().item()
    spread = math.sqrt(steps * (variance * (1 - 2 * fraction) ** 2).sum().item())
    assert abs(squares - steps * variance.sum().item()) < LIMIT * spread


def test_values_that_bfloat16_holds_do_not_change():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    values = values[~values.isnan()]  # signed zeros, subnormals and infinities included
    rounded = round_by_torch(values.float())
    assert torch.equal(rounded.view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize(
    "payload", [0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0x7FFF0000, 0xFFFFFFFF, 0xFF800001, 0x7F80FFFF]
)
def test_nan_stays_nan_and_infects_nobody(payload):
    values = torch.full((4096,), 1.5)
    values.view(torch.int32)[::3] = payload - 2**32 if payload >= 2**31 else payload
    values[1::3] = math.inf
    rounded = round_by_torch(values)
    assert rounded[::3].isnan().all()
    assert (rounded[1::3] == math.inf).all()
    assert (rounded[2::3] == 1.5).all()


def test_rounding_is_the_documented_arithmetic():
    """Any finite value, either sign, subnormals and the largest: bits + noise, lower half cut off."""
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[values.isfinite()]
    key = stream_key(tensor_key(11, 12), 13, 2)
    expected = oracles.to_bf16_stochastic(values.numpy(), oracles.noise(11, 12, 13, 2, range(5, 5 + len(values))))
    rounded = round_by_torch(values, key, start=5)
    assert torch.equal(rounded.float().view(torch.int32), torch.from_numpy(expected).view(torch.int32))


def test_rounding_of_strided_tensors_follows_logical_order():
    values = torch.rand(13, 7) + 1
    expected = round_by_torch(values.reshape(-1), start=4).view(13, 7)
    target = torch.empty(7, 13, dtype=torch.bfloat16).t()
    store_stochastic_(target, values.t().contiguous().t(), 12345, 4)
    assert torch.equal(target, expected)


def test_mean_of_tiny_updates_survives():
    """1000 updates of 1.07e-4 spacings of 1.0: the mean moves by their sum, and under rounding to nearest not at all.

    The update is 7 / 65536 of a spacing, so p + update is exact in fp32 from either neighbour.
    """
    elements, steps, part = 4096, 1000, 7 / 65536
    moved = {}
    for stochastic in (True, False):
        p, step = torch.ones(elements, dtype=torch.bfloat16), torch.tensor(0.0)
        grad = torch.full((elements,), -part * ULP)
        for _ in range(steps):
            scaled_update_([p], [grad], [step], lr=1.0, weight_decay=0.0, rounding=Rounding(stochastic, seed=5))
        moved[stochastic] = (p.double() - 1).mean().item() / ULP
    assert moved[False] == 0.0
    spread = math.sqrt(steps * part * (1 - part) / elements)
    assert abs(moved[True] - steps * part) < LIMIT * spread


def test_rounds_stochastically():
    assert rounds_stochastically(torch.bfloat16, None)
    assert rounds_stochastically(torch.bfloat16, True)
    assert not rounds_stochastically(torch.bfloat16, False)
    assert not any(rounds_stochastically(torch.float32, choice) for choice in (None, True, False))
    assert not any(rounds_stochastically(torch.float16, choice) for choice in (None, False))
    with pytest.raises(ValueError, match=r"stochastic_rounding=True .* float16; allowed: bfloat16, float32"):
        rounds_stochastically(torch.float16, True)


def test_uids_must_be_one_for_each_parameter():
    with pytest.raises(ValueError, match=r"rounding\.uids has 2 entries; allowed: 3"):
        Rounding(uids=[1, 2]).keys(3)
    assert Rounding(seed=9).keys(3) == tuple(tensor_key(9, uid) for uid in range(3))
