"""The reference of examples/custom_verb against float64: every stored value is the exact result rounded once."""

import inspect

import pytest
import torch
from lion_kernels import launch, lion_, reference

from buckets import make_bucket
from lowmem_kernels import GradTransform
from lowmem_kernels.testing import PRECISIONS, SHAPES, assert_rounded, assert_same_bits

LION = {"lr": 2e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def test_the_three_places_of_the_verb_agree():
    public = dict(inspect.signature(lion_).parameters)
    del public["backend"]
    for module in (reference, launch):
        private = inspect.signature(module.lion_).parameters
        assert [(n, p.kind, p.annotation) for n, p in private.items()] == [
            (n, p.kind, p.annotation) for n, p in public.items()
        ]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_one_step(precision):
    """fp32 arithmetic is bounded term by term in units of 2**-24; where that decides the sign, either one is right."""
    unit, (beta1, beta2), lr = 2.0**-24, LION["betas"], LION["lr"]
    bucket = make_bucket(SHAPES, precision)
    before = bucket.copies()
    lion_(bucket.params, bucket.grads, bucket.exp_avgs, bucket.steps, **LION, rounding=bucket.rounding())
    for i, case in enumerate(SHAPES):
        p, g, m = (column[i].double() for column in before[:3])
        mixed, terms = beta1 * m + (1 - beta1) * g, beta1 * m.abs() + (1 - beta1) * g.abs()
        decayed = LION["weight_decay"] * p
        unsure = torch.where(mixed.abs() <= 4 * unit * terms, 2 * lr, 0.0)
        error = unsure + unit * (4 * lr * (1 + decayed.abs()) + p.abs())
        options = {"stochastic": precision.stochastic, "name": case.name}
        assert_rounded(bucket.params[i], p - lr * (mixed.sign() + decayed), error, **options)
        moved = m + (1 - beta2) * (g - m)
        assert_rounded(bucket.exp_avgs[i], moved, 4 * unit * (m.abs() + g.abs()), **options)
        assert bucket.steps[i] == before[4][i] + 1


@pytest.mark.parametrize("skip", [True, False])
def test_nan(skip):
    """It stops its own element, or is seen in it."""
    bucket = make_bucket(SHAPES[:3])
    bucket.grads[2].view(-1)[1] = torch.nan
    before, skipped = bucket.copies(), torch.tensor(0)
    transform = GradTransform(skip_nonfinite=skip, skipped=skipped)
    lion_(bucket.params, bucket.grads, bucket.exp_avgs, bucket.steps, **LION, transform=transform)
    assert skipped == int(skip)
    for actual, old in ((bucket.params[2], before[0][2]), (bucket.exp_avgs[2], before[2][2])):
        same = (actual == old).view(-1)
        assert actual.isnan().sum() == int(not skip)
        assert same.tolist() == [skip and k == 1 for k in range(actual.numel())]


def test_found_inf_stops_everything():
    bucket = make_bucket(SHAPES[:3])
    before = bucket.copies()
    transform = GradTransform(found_inf=torch.tensor(1.0))
    lion_(bucket.params, bucket.grads, bucket.exp_avgs, bucket.steps, **LION, transform=transform)
    for column, old in zip(bucket.columns(), before, strict=True):
        for a, b in zip(column, old, strict=True):
            assert_same_bits(a, b)
