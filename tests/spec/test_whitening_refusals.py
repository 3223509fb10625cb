"""What the whitening verbs refuse, by name, before anything is written."""

import pytest
import torch

from buckets import make_bucket
from lowmem_kernels import Rounding
from lowmem_kernels.testing import Case, assert_same_bits
from lowmem_kernels.whitening import WhiteningRule, whiten_, whitened

THREE = [Case("a", (4, 6)), Case("b", (5, 3)), Case("c", (2, 3, 5))]
HYPER = dict(lr=0.1, scale=0.2, weight_decay=0.1, rule=WhiteningRule())

WRONG = {
    "grads_short": ("grads", None, lambda c: c[:-1], ValueError, r"grads has 2 entries; allowed: 3, one for each"),
    "grad_device": ("grads", 1, lambda t: t.to("meta"), ValueError, r"grads\[1\] is on meta; allowed: cpu"),
    "grad_shape": ("grads", 0, lambda t: t.t(), ValueError, r"grads\[0\] has shape \(6, 4\); allowed: \(4, 6\)"),
    "grad_mixed": ("grads", 2, lambda t: t.half(), TypeError, r"grads\[2\] is float16; allowed: float32, as grads"),
    "param_float64": ("params", 0, lambda t: t.double(), TypeError, r"params\[0\] is float64; allowed: float32, bf"),
    "param_mixed": ("params", 1, lambda t: t.half(), TypeError, r"params\[1\] is float16; allowed: float32, as par"),
    "steps_long": ("steps", None, lambda c: [*c, c[0]], ValueError, r"steps has 4 entries; allowed: 3"),
    "step_dtype": ("steps", 1, lambda t: t.long(), TypeError, r"steps\[1\] is int64; allowed: float32"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_lists_that_do_not_fit(wrong):
    name, index, change, error, message = WRONG[wrong]
    bucket = make_bucket(THREE)
    column = getattr(bucket, name)
    if index is None:
        column[:] = change(column)
    else:
        column[index] = change(column[index])
    before = [p.clone() for p in bucket.params]
    with pytest.raises(error, match=message):
        whiten_(bucket.params, bucket.grads, bucket.steps, **HYPER)
    for p, old in zip(bucket.params, before, strict=True):
        assert_same_bits(p, old)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_vectors(shape):
    bucket = make_bucket([*THREE, Case("vector", shape)])
    allowed = r"has shape \(.*\); allowed: two or more dimensions"
    with pytest.raises(ValueError, match=rf"params\[3\] {allowed}"):
        whiten_(bucket.params, bucket.grads, bucket.steps, **HYPER)
    with pytest.raises(ValueError, match=rf"grads\[3\] {allowed}"):
        whitened(bucket.grads, rule=WhiteningRule())


def test_gradients_by_themselves():
    with pytest.raises(TypeError, match=r"grads\[0\] is float64; allowed: float32, bfloat16, float16"):
        whitened([torch.ones(3, 3).double()], rule=WhiteningRule())
    with pytest.raises(ValueError, match=r"grads\[1\] is on meta; allowed: cpu"):
        whitened([torch.ones(3, 3), torch.ones(3, 3, device="meta")], rule=WhiteningRule())


def test_uids():
    bucket = make_bucket(THREE)
    with pytest.raises(ValueError, match=r"rounding.uids has 1 entries; allowed: 3"):
        whiten_(bucket.params, bucket.grads, bucket.steps, rounding=Rounding(uids=[1]), **HYPER)


def test_nothing():
    whiten_([], [], [], **HYPER)
    assert whitened([], rule=WhiteningRule()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(normalize="column"), r"rule.normalize is 'column'; allowed: 'gradnorm', 'row', None"),
        (dict(solver="svd"), r"rule.solver is 'svd'; allowed: 'coupled', 'polynomial'"),
        (dict(iterations=0), r"rule.iterations is 0; allowed: an integer of at least 1, or None"),
        (dict(beta=0.0), r"rule.beta is 0.0; allowed: a number in \(0, 1\]"),
        (dict(beta=1.1), r"rule.beta is 1.1; allowed"),
        (dict(beta=float("nan")), r"rule.beta is nan; allowed"),
    ],
    ids=str,
)
def test_rules(options, message):
    with pytest.raises(ValueError, match=message):
        WhiteningRule(**options)
