"""What the factored verbs promise besides numbers: what is skipped, what is refused, and the same bits every time."""

import pytest
import torch

from buckets import FP32
from factored_buckets import CAME, DIALECTS, NAMES, RULES, assert_same_buckets, make_bucket
from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.factored import FactoredRule, confidence_update_, factored_update_
from lowmem_kernels.testing import SHAPES, Case, Precision, assert_same_bits

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
FEW = [
    case
    for case in SHAPES
    if case.name in ("scalar", "empty", "block", "odd_matrix", "transposed_param", "experts", "columns_of_wider")
]
PLACES = {case.name: i for i, case in enumerate(FEW)}
every_dialect = pytest.mark.parametrize("name", DIALECTS)
every_precision = pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)


def bucket_of(name, precision=FP32, cases=FEW, **options):
    return make_bucket(cases, precision, seed=5, verb=DIALECTS[name][0], **options)


def run(bucket, name, **options):
    verb, hyper = DIALECTS[name]
    bucket.run(verb, **{**hyper, **options})


def check_skipped(name, precision, spoil, spoiled, **transform):
    """Parameters in ``spoiled`` keep everything and count as one each; the others are updated as without them."""
    bad, good = bucket_of(name, precision), bucket_of(name, precision)
    spoil(bad)
    before = bad.copies()
    skipped = torch.tensor(7)
    run(bad, name, transform=GradTransform(**transform, skipped=skipped))
    run(good, name, transform=GradTransform(**transform))
    assert skipped.item() == 7 + len(spoiled)
    kept = [i for i in range(len(FEW)) if i in spoiled]
    others = [i for i in range(len(FEW)) if i not in spoiled]
    for indices, expected in ((kept, before), (others, good.columns())):
        expected = [[column[i] for i in indices] for column in expected]
        assert_same_buckets(bad.only(indices).columns(), expected, [n for n in NAMES if n != "grads"])
    for i in others:
        assert bad.steps[i] == before[-1][i] + 1


@every_precision
@pytest.mark.parametrize("clip_value", [None, 1e-3])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@every_dialect
def test_one_bad_element_skips_its_parameter(name, value, clip_value, precision):
    """Clipping by value would turn an Inf into a number: it must not."""

    def spoil(bucket):
        bucket.grads[PLACES["scalar"]].fill_(value)
        bucket.grads[PLACES["block"]][77] = value
        bucket.grads[PLACES["experts"]][1, 2, 3] = value
        bucket.grads[PLACES["transposed_param"]][26, 18] = value

    places = [PLACES[n] for n in ("scalar", "block", "experts", "transposed_param")]
    check_skipped(name, precision, spoil, places, clip_value=clip_value)


@every_dialect
def test_bad_elements_count_once(name):
    def spoil(bucket):
        bucket.grads[PLACES["odd_matrix"]][3:7, 5:20] = torch.nan
        bucket.grads[PLACES["odd_matrix"]][0, 0] = torch.inf
        bucket.grads[PLACES["odd_matrix"]][0, 1] = -torch.inf

    check_skipped(name, FP32, spoil, [PLACES["odd_matrix"]])


@pytest.mark.parametrize("place", ["scalar", "block", "odd_matrix", "experts", "transposed_param"])
@every_precision
@every_dialect
def test_a_square_that_overflows_is_skipped(name, precision, place):
    """The gradient is finite and its square is not: V would be Inf for ever, and the parameter would stand still."""

    def spoil(bucket):
        grad = bucket.grads[PLACES[place]]
        grad[(-1,) * grad.ndim] = 1e25

    check_skipped(name, precision, spoil, [PLACES[place]])


@pytest.mark.parametrize("line", ["row", "column"])
@every_dialect
def test_a_sum_of_squares_that_overflows_is_skipped(name, line):
    """Squares of 2.2e38 are finite, two of them in a row or column are not."""

    def spoil(bucket):
        grad = bucket.grads[PLACES["odd_matrix"]]
        (grad[4, :2] if line == "row" else grad[:2, 4]).fill_(1.5e19)

    check_skipped(name, FP32, spoil, [PLACES["odd_matrix"]])


@pytest.mark.parametrize("tensor", ["inv_scale", "clip_coef"])
@every_dialect
def test_overflow_inside_the_transform_is_skipped_too(name, tensor):
    def spoil(bucket):
        for i, grad in enumerate(bucket.grads):
            bucket.grads[i] = grad * 2.0**-100
        bucket.grads[PLACES["experts"]][0, 0, 0] = 2.0**60

    bad, good = bucket_of(name), bucket_of(name)
    spoil(bad)
    spoil(good)
    good.grads[PLACES["experts"]][0, 0, 0] = torch.inf
    for bucket in (bad, good):
        skipped = torch.tensor(0)
        run(bucket, name, transform=GradTransform(**{tensor: torch.tensor(2.0**100)}, skipped=skipped))
        assert skipped.item() == 1
    assert_same_buckets(bad, good, [n for n in NAMES if n != "grads"])


@every_dialect
def test_nonfinite_elements_go_through_when_asked(name):
    bucket, before = bucket_of(name), bucket_of(name)
    place = PLACES["odd_matrix"]
    bucket.grads[place][3, 4] = torch.inf
    bucket.grads[PLACES["block"]][9] = torch.nan
    skipped = torch.tensor(0)
    run(bucket, name, transform=GradTransform(skip_nonfinite=False, skipped=skipped))
    assert skipped.item() == 0
    assert not bucket.params[place].isfinite().all()
    assert not bucket.rows[place][3].isfinite()
    assert not bucket.cols[place][4].isfinite()
    assert not bucket.params[PLACES["block"]][9].isfinite()
    assert [s.item() for s in bucket.steps] == [s.item() + 1 for s in before.steps]


@every_dialect
def test_infinite_gradient_is_clipped_when_not_skipped(name):
    bucket, same = bucket_of(name), bucket_of(name)
    for b, values in ((bucket, (torch.inf, -torch.inf)), (same, (0.25, -0.25))):
        b.grads[PLACES["odd_matrix"]][1, :2] = torch.tensor(values)
        b.grads[PLACES["block"]][:2] = torch.tensor(values)
        run(b, name, transform=GradTransform(clip_value=0.25, skip_nonfinite=False))
    assert_same_buckets(bucket, same, [n for n in NAMES if n != "grads"])


@every_precision
@every_dialect
def test_found_inf_leaves_everything(name, precision):
    bucket, same, skipped = bucket_of(name, precision), bucket_of(name, precision), torch.tensor(0)
    before = bucket.copies()
    bucket.grads[2][:3] = torch.inf
    grads = [g.clone() for g in bucket.grads]
    run(bucket, name, transform=GradTransform(found_inf=torch.tensor(1.0), skipped=skipped))
    assert_same_buckets(bucket, before, [n for n in NAMES if n != "grads"])
    for a, b in zip(bucket.grads, grads, strict=True):
        assert_same_bits(a, b)
    assert skipped.item() == 0
    bucket = bucket_of(name, precision)
    run(bucket, name, transform=GradTransform(found_inf=torch.tensor(0.0), skipped=skipped))
    run(same, name)
    assert_same_buckets(bucket, same)


@every_precision
@every_dialect
def test_same_bits_alone_and_on_every_run(name, precision):
    together, again, alone = (bucket_of(name, precision) for _ in range(3))
    for _ in range(2):
        run(together, name)
        run(again, name)
        for i in range(len(FEW)):
            run(alone.only([i]), name, rounding=alone.rounding([i]))
    assert_same_buckets(again, together)
    assert_same_buckets(alone, together)


@every_precision
@every_dialect
def test_no_step_length_no_change(name, precision):
    """lr 0 leaves parameters as they are, with weight decay and stochastic rounding, also where gradients are zero."""
    bucket, skipped = bucket_of(name, precision, fresh=True), torch.tensor(0)
    before = bucket.copies()
    for grad in (*bucket.grads[::2], *bucket.grads[1::2]):
        run(bucket, name, lr=0.0, weight_decay=0.1, transform=GradTransform(skipped=skipped))
        assert_same_buckets(bucket, before, ["params"])
        grad.zero_()
    assert skipped.item() == 0
    assert all(x.isfinite().all() for column in bucket.columns() for x in column if x is not None)


@every_precision
@every_dialect
def test_zero_gradients_only_decay(name, precision):
    """From zero states too, where V is eps1 or nothing: 0 / sqrt(0) must not appear."""
    bucket = bucket_of(name, precision, fresh=True)
    for grad in bucket.grads:
        grad.zero_()
    before = bucket.copies()
    run(bucket, name, weight_decay=0.0)
    assert_same_buckets(bucket, before, ["params", "exp_avgs"])
    run(bucket, name, weight_decay=0.5, lr=0.5)
    for param, old in zip(bucket.params, before[0], strict=True):
        assert (param.abs() <= old.abs()).all()
        assert param.isfinite().all()


@every_precision
@every_dialect
def test_lr_may_be_a_tensor(name, precision):
    lr = torch.tensor(1e-3)
    bucket, same = bucket_of(name, precision), bucket_of(name, precision)
    run(bucket, name, lr=lr)
    run(same, name, lr=lr.item())
    assert_same_buckets(bucket, same)
    assert lr.item() == torch.tensor(1e-3).item()


@every_dialect
def test_parameters_that_require_grad(name):
    bucket, plain = bucket_of(name), bucket_of(name)
    for param in bucket.params:
        param.requires_grad_()
    version = bucket.params[-1]._version
    run(bucket, name)
    run(plain, name)
    assert bucket.params[-1]._version > version
    assert_same_buckets([[x if x is None else x.detach() for x in column] for column in bucket.columns()], plain)


def test_param_sums_are_no_concern_of_the_reference():
    bucket, same = bucket_of("adalomo"), bucket_of("adalomo")
    sums = [torch.tensor(torch.nan) for _ in FEW]
    run(bucket, "adalomo", param_sums=sums)
    run(same, "adalomo")
    assert_same_buckets(bucket, same)
    assert all(s.isnan() for s in sums)


def test_noise_depends_on_uid_step_and_stream():
    """Two parameters with equal contents round differently, one parameter differently at another step."""
    results = {}
    for name, uid, step in (("a", 1, 4.0), ("same", 1, 4.0), ("other_uid", 2, 4.0), ("other_step", 1, 5.0)):
        bucket = make_bucket([Case("p", (64, 64))], BF16_SR)
        bucket.steps[0].fill_(step)
        rule = FactoredRule(beta2=0.99, beta1=0.9)  # with nothing that depends on the step but noise
        bucket.run("factored", rule=rule, lr=1e-2, weight_decay=0.0, rounding=Rounding(True, 3, [uid]))
        results[name] = bucket
    assert_same_bits(results["same"].params[0], results["a"].params[0])
    for other in ("other_uid", "other_step"):
        for column in ("params", "exp_avgs"):
            a, b = (getattr(results[n], column)[0] for n in ("a", other))
            assert (a != b).float().mean() > 0.1


def test_empty_lists_are_no_work():
    factored_update_([], [], [], [], [], **RULES["relative"])
    factored_update_([], [], [], [], [], **RULES["external"], exp_avgs=[], param_sums=[])
    confidence_update_([], [], [], [], [], [], [], [], **CAME)


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
    "grads_short": ("grads", None, shorter, ValueError, r"grads has 2 tensors; allowed: 3, one for each"),
    "grads_none": ("grads", None, none, ValueError, r"grads has 0 tensors; allowed: 3"),
    "grad_device": ("grads", 1, meta, ValueError, r"grads\[1\] is on meta; allowed: cpu"),
    "grad_shape": ("grads", 0, lambda t: t.t(), ValueError, r"grads\[0\] has shape \(6, 4\); allowed: \(4, 6\)"),
    "grad_mixed": ("grads", 2, half, TypeError, r"grads\[2\] is float16; allowed: float32, as grads\[0\]"),
    "params_long": ("params", None, longer, ValueError, r"grads has 3 tensors; allowed: 4"),
    "param_float64": ("params", 0, double, TypeError, r"params\[0\] is float64; allowed: float32, bfloat16, float16"),
    "param_mixed": ("params", 1, bf16, TypeError, r"params\[1\] is bfloat16; allowed: float32, as params\[0\]"),
    "steps_long": ("steps", None, longer, ValueError, r"steps has 4 tensors; allowed: 3"),
    "step_dtype": ("steps", 1, lambda t: t.long(), TypeError, r"steps\[1\] is int64; allowed: float32"),
    "step_1d": ("steps", 2, lambda t: t[None], ValueError, r"steps\[2\] has shape \(1,\); allowed: \(\)"),
    "step_device": ("steps", 0, meta, ValueError, r"steps\[0\] is on meta; allowed: cpu"),
    "rows_short": ("rows", None, shorter, ValueError, r"rows has 2 tensors; allowed: 3"),
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
    "col_missing": ("cols", 2, nothing, ValueError, r"cols\[2\] is None; allowed: a tensor, .*shape \(2, 3, 5\)"),
    "col_superfluous": ("cols", 1, something, ValueError, r"cols\[1\] is a tensor; allowed: None, .*shape \(5,\)"),
    "col_half": ("cols", 0, half, TypeError, r"cols\[0\] is float16; allowed: float32"),
    "col_shape": ("cols", 0, lambda t: torch.zeros(4), ValueError, r"cols\[0\] has shape \(4,\); allowed: \(6,\)"),
    "col_shape_last": ("cols", 2, lambda t: t[1:], ValueError, r"cols\[2\] has shape \(1, 5\); allowed: \(2, 5\)"),
    "col_strided": ("cols", 0, strided, ValueError, r"cols\[0\] is not contiguous; allowed: contiguous"),
    "m_none": ("exp_avgs", None, none, ValueError, r"exp_avgs has 0 tensors; allowed: 3"),
    "m_bf16": ("exp_avgs", 0, bf16, TypeError, r"exp_avgs\[0\] is bfloat16; allowed: float32"),
    "m_shape": ("exp_avgs", 1, lambda t: t[:4], ValueError, r"exp_avgs\[1\] has shape \(4,\); allowed: \(5,\)"),
    "m_strided": ("exp_avgs", 0, strided, ValueError, r"exp_avgs\[0\] is not contiguous; allowed: contiguous"),
}
WRONG_RESIDUALS = {
    "res_rows_short": ("res_rows", None, shorter, ValueError, r"res_rows .*allowed: "),
    "res_cols_none": ("res_cols", None, none, ValueError, r"res_cols .*allowed: "),
    "res_row_missing": ("res_rows", 0, nothing, ValueError, r"res_rows .*allowed: a tensor for each of 2 or more"),
    "res_row_superfluous": ("res_rows", 1, something, ValueError, r"res_rows .*2 or more dimensions, else None"),
    "res_col_superfluous": ("res_cols", 1, something, ValueError, r"res_cols .*2 or more dimensions, else None"),
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
    bucket = bucket_of(name, cases=THREE)
    change(bucket)
    before = [[x if x is None or x.is_meta else x.clone() for x in column] for column in bucket.columns()]
    with pytest.raises(error, match=message):
        run(bucket, name, **{"rounding": Rounding(), **options})
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
        ([zero, zero], ValueError, r"param_sums has 2 tensors; allowed: 3"),
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
    exp_avgs = bucket_of("adalomo", cases=THREE).exp_avgs
    message = r"exp_avgs is given and rule\.beta1 is None; allowed: both or neither"
    check_refused("adalomo", ValueError, message, exp_avgs=exp_avgs)
