"""The sum of p² that is carried to the next step: the bits of one that is taken anew, and p is read once less."""

from dataclasses import replace

import pytest
import torch

from buckets import FP32
from factored_buckets import RULES, assert_same_buckets, make_bucket, set_gradients
from lowmem_kernels import GradTransform
from lowmem_kernels.testing import SHAPES, Case, Precision, assert_same_bits

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
CASES = [
    *(case for case in SHAPES if case.name in ("scalar", "empty", "odd_matrix", "transposed_param", "experts")),
    Case("wide", (24, 136)),
    Case("long_vector", (9000,)),
]
MOMENTUM = dict(RULES["adalomo"], rule=replace(RULES["adalomo"]["rule"], beta1=0.9))
OPTIONS = {"torch": RULES["torch"], "momentum": MOMENTUM}


def unknown():
    return [torch.tensor(torch.nan) for _ in CASES]


def step(bucket, options, sums, seed=0, transform=None, bad=None):
    set_gradients(bucket, CASES, seed)
    if bad is not None:
        bucket.grads[bad].fill_(torch.nan)
    bucket.run("factored", backend="triton", param_sums=sums, transform=transform or GradTransform(), **options)


@pytest.mark.parametrize(("name", "precision"), [("torch", FP32), ("momentum", BF16_SR)], ids=str)
def test_carried_has_the_bits_of_taken_anew(name, precision):
    options = OPTIONS[name]
    carrying, forgetting, without = (make_bucket(CASES, precision) for _ in range(3))
    sums, others = unknown(), unknown()
    for seed in (0, 100):
        step(carrying, options, sums, seed)
        step(forgetting, options, others, seed)
        step(without, options, None, seed)
        for one, other, param in zip(sums, others, carrying.params, strict=True):
            assert_same_bits(one, other)
            other.fill_(torch.nan)
            exact = param.double().square().sum().item()
            # thousands of squares of one sign, in a tree of lanes and tiles: 16 units of 2**-24
            assert abs(one.item() - exact) <= 2.0**-20 * exact
    assert_same_buckets(forgetting, carrying)
    assert_same_buckets(without, carrying)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_change_of_p_is_old_after_one_step(options):
    """The step that follows a change that nobody noticed uses the old sum, and leaves that of p as it then is."""
    bucket, anew = make_bucket(CASES), make_bucket(CASES)
    sums, others = unknown(), unknown()
    step(bucket, options, sums)
    for param in bucket.params:
        param.mul_(2)
    step(bucket, options, sums, seed=100)
    for to, of in zip(anew.columns(), bucket.columns(), strict=True):
        for a, b in zip(to, of, strict=True):
            if a is not None and a.numel():
                a.copy_(b)
    step(bucket, options, sums, seed=200)
    step(anew, options, others, seed=200)
    assert_same_buckets(bucket, anew)


def test_the_carried_sum_is_what_the_step_uses():
    """A wrong one makes another step: 4 times the sum of squares is twice the rate."""
    bucket, wrong = make_bucket(CASES), make_bucket(CASES)
    options = dict(RULES["relative"], rule=replace(RULES["relative"]["rule"], eps=(1e-30, 0.0)))
    exact = [param.double().square().sum().float() for param in bucket.params]
    start = bucket.copies()[0]
    step(bucket, options, [s.clone() for s in exact])
    step(wrong, options, [4 * s for s in exact])
    for p, q, old in zip(bucket.params, wrong.params, start, strict=True):
        moved, twice = (p - old).double(), (q - old).double()
        # p is rounded after a step of a 100th of it, so 2**-24 of p is 1e-5 of the step
        assert torch.linalg.vector_norm(twice - 2 * moved) <= 1e-4 * torch.linalg.vector_norm(moved)


def test_it_stays_where_p_stays():
    """Nothing is written for a parameter that is skipped, nor with found_inf, nor where no rate is scaled."""
    bucket = make_bucket(CASES)
    sums = unknown()
    step(bucket, RULES["torch"], sums)
    before = [s.clone() for s in sums]
    step(bucket, RULES["torch"], sums, seed=100, bad=2)
    assert [torch.equal(s, b) for s, b in zip(sums, before, strict=True)] == [i in (1, 2) for i in range(len(CASES))]
    before = [s.clone() for s in sums]
    step(bucket, RULES["torch"], sums, transform=GradTransform(found_inf=torch.tensor(1.0)))
    step(bucket, RULES["constant_beta2"], sums)
    assert_same_bits(torch.stack(sums), torch.stack(before))
