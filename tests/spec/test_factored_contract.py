"""What the factored verbs promise besides numbers: what is skipped, and the same bits every time."""

import pytest
import torch

from buckets import FP32
from factored_buckets import CAME, DIALECTS, NAMES, RULES, assert_same_buckets, make_bucket
from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.factored import FactoredRule, confidence_update_, factored_update_
from lowmem_kernels.testing import SHAPES, Case, Precision, assert_same_bits
from lowmem_kernels.testing.cases import lay_out

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


@pytest.mark.parametrize(
    "layouts", [("transposed", "transposed"), ("contiguous", "transposed"), ("columns", "columns")]
)
@pytest.mark.parametrize("shape", [(37, 29), (3, 11, 23), (257, 520), (4, 70000)], ids=str)
@every_precision
@pytest.mark.parametrize("name", ["adalomo", "torch", "came"])
def test_same_bits_in_every_layout(name, precision, shape, layouts):
    """Sums depend on a parameter's shape only, not on how it lies in memory."""
    bucket, plain = (bucket_of(name, precision, [Case("p", shape)]) for _ in range(2))
    bucket.params[0] = lay_out(bucket.params[0], layouts[0])
    bucket.grads[0] = lay_out(bucket.grads[0], layouts[1])
    run(bucket, name)
    run(plain, name)
    assert_same_buckets(bucket, plain)


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
