"""What the factored verbs refuse, by name, before anything is written."""

import pytest
import torch

from factored_buckets import DIALECTS, make_bucket
from lowmem_kernels import Rounding
from lowmem_kernels.factored import FactoredRule, factored_update_
from lowmem_kernels.testing import Case

THREE = [Case("a", (4, 6)), Case("b", (5,)), Case("c", (2, 3, 5))]


def replaced(name, index, tensor):
    """A function that puts ``tensor(old)`` in a list of a bucket, or another list where index is None."""

    def change(bucket):
        column = getattr(bucket, name)
        if index is None:
            column[:] = tensor(column)
        else:
            column[index] = tensor(column[index])

    return change


double, half, bf16 = (lambda t: t.double()), (lambda t: t.half()), (lambda t: t.bfloat16())
meta, nothing, something = (lambda t: t.to("meta")), (lambda t: None), (lambda t: torch.zeros(5))
shorter, longer, none = (lambda c: c[:-1]), (lambda c: [*c, c[0]]), (lambda c: [])
strided = lambda t: torch.stack([t, t], -1)[..., 0]  # noqa: E731

WRONG = {
    "grads_short": ("grads", None, shorter, ValueError, r"grads has 2 entries; allowed: 3, one for each"),
    "grads_none": ("grads", None, none, ValueError, r"grads has 0 entries; allowed: 3"),
    "grad_device": ("grads", 1, meta, ValueError, r"grads\[1\] is on meta; allowed: cpu"),
    "grad_shape": ("grads", 0, lambda t: t.t(), ValueError, r"grads\[0\] has shape \(6, 4\); allowed: \(4, 6\)"),
    "grad_mixed": ("grads", 2, half, TypeError, r"grads\[2\] is float16; allowed: float32, as grads\[0\]"),
    "params_long": ("params", None, longer, ValueError, r"grads has 3 entries; allowed: 4"),
    "param_float64": ("params", 0, double, TypeError, r"params\[0\] is float64; allowed: float32, bfloat16, float16"),
    "param_mixed": ("params", 1, bf16, TypeError, r"params\[1\] is bfloat16; allowed: float32, as params\[0\]"),
    "steps_long": ("steps", None, longer, ValueError, r"steps has 4 entries; allowed: 3"),
    "step_dtype": ("steps", 1, lambda t: t.long(), TypeError, r"steps\[1\] is int64; allowed: float32"),
    "step_1d": ("steps", 2, lambda t: t[None], ValueError, r"steps\[2\] has shape \(1,\); allowed: \(\)"),
    "step_device": ("steps", 0, meta, ValueError, r"steps\[0\] is on meta; allowed: cpu"),
    "rows_short": ("rows", None, shorter, ValueError, r"rows has 2 entries; allowed: 3"),
    "row_bf16": ("rows", 0, bf16, TypeError, r"rows\[0\] is bfloat16; allowed: float32"),
    "row_shape": ("rows", 0, lambda t: torch.zeros(6), ValueError, r"rows\[0\] has shape \(6,\); allowed: \(4,\)"),
    "row_keepdim": (
        "rows",
        2,
        lambda t: t[..., None],
        ValueError,
        r"rows\[2\] has shape \(2, 3, 1\); allowed: \(2, 3\)",
    ),
    "row_vector": ("rows", 1, lambda t: t[:4], ValueError, r"rows\[1\] has shape \(4,\); allowed: \(5,\)"),
    "row_strided": ("rows", 2, strided, ValueError, r"rows\[2\] is not contiguous; allowed: contiguous"),
    "row_device": ("rows", 1, meta, ValueError, r"rows\[1\] is on meta; allowed: cpu"),
    "cols_short": ("cols", None, shorter, ValueError, r"cols has 2 entries; allowed: 3, one for each parameter"),
    "cols_none": ("cols", None, none, ValueError, r"cols has 0 entries; allowed: 3"),
    "col_missing": ("cols", 2, nothing, ValueError, r"cols\[2\] is None; allowed: a tensor of shape \(2, 5\)"),
    "col_superfluous": ("cols", 1, something, ValueError, r"cols\[1\] is a tensor; allowed: None"),
    "col_half": ("cols", 0, half, TypeError, r"cols\[0\] is float16; allowed: float32"),
    "col_shape": ("cols", 0, lambda t: torch.zeros(4), ValueError, r"cols\[0\] has shape \(4,\); allowed: \(6,\)"),
    "col_shape_last": ("cols", 2, lambda t: t[1:], ValueError, r"cols\[2\] has shape \(1, 5\); allowed: \(2, 5\)"),
    "col_strided": ("cols", 0, strided, ValueError, r"cols\[0\] is not contiguous; allowed: contiguous"),
    "m_none": ("exp_avgs", None, none, ValueError, r"exp_avgs has 0 entries; allowed: 3"),
    "m_bf16": ("exp_avgs", 0, bf16, TypeError, r"exp_avgs\[0\] is bfloat16; allowed: float32"),
    "m_shape": ("exp_avgs", 1, lambda t: t[:4], ValueError, r"exp_avgs\[1\] has shape \(4,\); allowed: \(5,\)"),
    "m_strided": ("exp_avgs", 0, strided, ValueError, r"exp_avgs\[0\] is not contiguous; allowed: contiguous"),
}
WRONG_RESIDUALS = {
    "res_rows_short": ("res_rows", None, shorter, ValueError, r"res_rows .*allowed: "),
    "res_cols_none": ("res_cols", None, none, ValueError, r"res_cols .*allowed: "),
    "res_row_missing": ("res_rows", 0, nothing, ValueError, r"res_rows\[0\] is None; allowed: a tensor .*\(4,\)"),
    "res_row_superfluous": ("res_rows", 1, something, ValueError, r"res_rows\[1\] is a tensor; allowed: None"),
    "res_col_superfluous": ("res_cols", 1, something, ValueError, r"res_cols\[1\] is a tensor; allowed: None"),
    "res_col_last": (
        "res_cols",
        2,
        lambda t: t[1:],
        ValueError,
        r"res_cols\[2\] has shape \(1, 5\); allowed: \(2, 5\)",
    ),
    "res_row_half": ("res_rows", 0, half, TypeError, r"res_rows\[0\] is float16; allowed: float32"),
    "res_row_shape": ("res_rows", 0, lambda t: t[1:], ValueError, r"res_rows\[0\] has shape \(3,\); allowed: \(4,\)"),
    "res_col_shape": ("res_cols", 0, lambda t: t[1:], ValueError, r"res_cols\[0\] has shape \(5,\); allowed: \(6,\)"),
}


def check_refused(name, error, message, change=lambda bucket: None, **options):
    verb, hyper = DIALECTS[name]
    bucket = make_bucket(THREE, verb=verb)
    change(bucket)
    before = [[x if x is None or x.is_meta else x.clone() for x in column] for column in bucket.columns()]
    with pytest.raises(error, match=message):
        bucket.run(verb, **{"rounding": Rounding(), **hyper, **options})
    for column, old in zip(bucket.columns(), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(column, old, strict=True) if a is not None and not a.is_meta)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["external", "came"])
def test_lists_that_do_not_fit_are_refused(name, wrong):
    column, index, tensor, error, message = wrong
    check_refused(name, error, message, replaced(column, index, tensor))


@pytest.mark.parametrize("wrong", WRONG_RESIDUALS.values(), ids=WRONG_RESIDUALS)
def test_residuals_that_do_not_fit_are_refused(wrong):
    column, index, tensor, error, message = wrong
    check_refused("came", error, message, replaced(column, index, tensor))


def test_param_sums_that_do_not_fit_are_refused():
    zero = torch.zeros(())
    refused = [
        ([zero, zero], ValueError, r"param_sums has 2 entries; allowed: 3"),
        ([zero, zero, zero.double()], TypeError, r"param_sums\[2\] is float64; allowed: float32"),
        ([zero, zero[None], zero], ValueError, r"param_sums\[1\] has shape \(1,\); allowed: \(\)"),
    ]
    for sums, error, message in refused:
        check_refused("adalomo", error, message, param_sums=sums)


@pytest.mark.parametrize("name", ["external", "came"])
def test_wrong_options_are_refused(name):
    check_refused(name, ValueError, r"rounding\.uids has 1 entries; allowed: 3", rounding=Rounding(uids=[1]))
    check_refused(name, ValueError, r"backend is 'cuda'; allowed: 'auto', 'triton', 'torch'", backend="cuda")


def test_rules_that_do_not_fit_are_refused():
    wrong = FactoredRule(lr_schedule="linear")
    message = r"rule\.lr_schedule is 'linear'; allowed: 'constant', 'rsqrt', 'warmup'"
    check_refused("adalomo", ValueError, message, rule=wrong)
    with pytest.raises(ValueError, match=message):
        factored_update_([], [], [], [], [], lr=1.0, weight_decay=0.0, rule=wrong)
    momentum = FactoredRule(beta1=0.9)
    message = r"exp_avgs is None and rule\.beta1 is 0\.9; allowed: both or neither"
    check_refused("adalomo", ValueError, message, rule=momentum, exp_avgs=None)
    exp_avgs = make_bucket(THREE).exp_avgs
    message = r"exp_avgs is given and rule\.beta1 is None; allowed: both or neither"
    check_refused("adalomo", ValueError, message, exp_avgs=exp_avgs)
