"""The factored kernels in Triton's interpreter against the torch reference, which tests/spec holds to the papers.

Both compute in fp32, but take their sums in another order, so results are close and not equal.
"""

from dataclasses import replace

import pytest
import torch

import parity
from buckets import FP32
from factored_buckets import DIALECTS, NAMES, RULES, assert_same_buckets, make_bucket, set_gradients
from lowmem_kernels import GradTransform
from lowmem_kernels.testing import PRECISIONS, SHAPES, Case, Precision, assert_same_bits

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
#: What SHAPES lacks: aligned rows wider than a narrow tile, in several tiles, slabs and groups; aligned small matrices,
#: more than a ticket has; vectors of several groups; nothing at all in several ways.
PLANNED = [
    Case("wide", (40, 264)),
    Case("wide_stack", (2, 24, 136)),
    Case("narrow", (150, 24)),
    Case("small_stack", (20, 3, 8)),
    Case("long_vector", (9000,)),
    Case("no_columns", (3, 0)),
    Case("no_rows", (2, 0, 5)),
    Case("no_elements", (0,)),
]
#: Stacks of many small matrices, a tile each, take most of the time; these stand for them.
SLOW = ("conv", "conv_channels_last", "conv_grad_channels_last", "reversed_dims")
SMALL_STACKS = [
    Case("conv", (3, 2, 3, 2)),
    Case("conv_channels_last", (2, 3, 3, 2), "channels_last", "channels_last"),
    Case("conv_grad_channels_last", (2, 2, 3, 3), "contiguous", "channels_last"),
    Case("reversed_dims", (2, 1, 3, 2, 4), "reversed", "contiguous"),
]
QUICK = [case for case in SHAPES if case.name not in SLOW] + SMALL_STACKS + PLANNED
FEW = [
    case
    for case in SHAPES
    if case.name in ("scalar", "empty", "odd_matrix", "experts", "transposed_param", "misaligned", "expanded_grad")
]
SOME = [case for case in SHAPES if case.name in ("seven", "odd_matrix", "experts", "transposed", "misaligned")]


def both(cases, name, precision=FP32, steps=1, transform=None, change=lambda grad: grad, fresh=False, **options):
    """The same steps by the reference and by the kernels: (start, expected, actual)."""
    verb, hyper = DIALECTS[name]
    buckets = [make_bucket(cases, precision, verb=verb, fresh=fresh) for _ in range(2)]
    for bucket, backend in zip(buckets, ("torch", "triton"), strict=True):
        for step in range(steps):
            set_gradients(bucket, cases, 50 * step, change)
            bucket.run(verb, transform=transform or GradTransform(), backend=backend, **{**hyper, **options})
    return make_bucket(cases, precision, verb=verb, fresh=fresh).copies(), *buckets


def assert_close(start, expected, actual, steps=1):
    """Within the bounds of parity.py. Gradients and counters have to be equal."""
    for name, column, other, old in zip(NAMES, actual.columns(), expected.columns(), start, strict=True):
        for i, (a, e, s) in enumerate(zip(column, other, old, strict=True)):
            if name in ("grads", "steps"):
                assert_same_bits(a, e, f"{name} of {actual.cases[i]}")
            elif a is not None:
                parity.assert_close(a, e, s, steps, f"{name} of {actual.cases[i]}")
    assert [step.item() for step in actual.steps] == [step.item() + steps for step in start[-1]]


@pytest.mark.parametrize(
    ("name", "cases"),
    [("relative", SHAPES), ("relative", PLANNED), ("torch", QUICK), ("came", QUICK)],
)
def test_every_shape(name, cases):
    assert_close(*both(cases, name))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["external", "came"])
def test_every_dtype(name, precision):
    """With a momentum, whose dtype is its own. Two steps, the first from zeros."""
    assert_close(*both(SOME, name, precision, steps=2, fresh=True), steps=2)


@pytest.mark.parametrize("precision", [FP32, PRECISIONS[4]], ids=str)
@pytest.mark.parametrize("name", [name for name in DIALECTS if name not in ("external", "came")])
def test_dialects(name, precision):
    assert_close(*both(FEW, name, precision, steps=2), steps=2)


EPS = DIALECTS["torch"][1]["rule"].eps[0]


@pytest.mark.parametrize(("scale", "least", "most"), [(1.0, 0, 0), (3e-3, 0.1, 0.9), (1e-5, 1, 1)])
def test_floor_of_the_torch_dialect(scale, least, most):
    """Felt nowhere, by some elements, by all: from zeros, so that R and C are of this gradient."""
    cases = [case for case in FEW if case.name in ("odd_matrix", "experts", "misaligned")]
    results = both(cases, "torch", change=lambda grad: scale * grad, fresh=True)
    assert_close(*results)
    for row, col in zip(results[1].rows, results[1].cols, strict=True):
        if col is not None:
            v = row[..., :, None] * col[..., None, :] / row.mean(-1).clamp(min=EPS)[..., None, None]
            assert least <= (v < EPS**2).float().mean() <= most


@pytest.mark.parametrize("scale", [1e-17, 1e-10, 1.0])
def test_a_small_floor(scale):
    """eps of 1e-30, whose square is 0 in fp32, elements without gradient, and squares of which 1/R is Inf."""
    cases = [case for case in SHAPES if case.name in ("row", "odd_matrix", "block_plus_1")]
    rule = replace(RULES["torch"]["rule"], eps=(1e-30, 1e-3))
    start, expected, actual = both(cases, "torch", change=lambda grad: scale * grad, fresh=True, rule=rule)
    for a, e, s in zip(actual.params, expected.params, start[0], strict=True):
        # fp32 has 2 to 8 digits of such squares left, and so have R and C; the update is of g, which has them all
        parity.assert_close(a, e, s, 1, "params")
        assert (a != s).float().mean() > 0.9
    assert [step.item() for step in actual.steps] == [1.0] * 3


def ruled(name, **changes):
    return dict(rule=replace(RULES[name]["rule"], **changes))


HYPER = {
    "lr_tensor": ("external", dict(lr=torch.tensor(2.0**-6))),
    "lr_tensor_came": ("came", dict(lr=torch.tensor(2.0**-6))),
    "lr_0": ("external", dict(lr=0.0)),
    "int_arguments": ("came", dict(lr=1, weight_decay=0, clip_threshold=1)),
    "decay_alone": ("adalomo", dict(weight_decay=3.0)),
    "warmup": ("adalomo", dict(lr=1e-4, **ruled("adalomo", lr_schedule="warmup"))),
    "warmup_over": ("adalomo", dict(lr=0.9, **ruled("adalomo", lr_schedule="warmup"))),
    "rsqrt_over": ("relative", dict(lr=0.9)),
    "lr_decay": ("adalomo", ruled("adalomo", scale_decay=False)),
    "eps2": ("adalomo", ruled("adalomo", eps=(1e-30, 0.5))),
    "clip_none": ("external", ruled("external", clip_threshold=float("inf"))),
    "clip_half": ("came", dict(clip_threshold=0.5)),
    "beta1_0": ("external", ruled("external", beta1=0.0)),
    "beta2_0": ("adalomo", ruled("adalomo", beta2=0.0)),
    "betas_short": ("came", dict(betas=(0.5, 0.0, 0.8))),
    "decay_rate": ("relative", ruled("relative", decay_rate=-0.5)),
}
PAIR = [case for case in SHAPES if case.name in ("odd_matrix", "seven")]


@pytest.mark.parametrize("option", HYPER)
def test_hyperparameters(option):
    name, options = HYPER[option]
    assert_close(*both(PAIR, name, steps=2, **options), steps=2)


TRANSFORMS = {
    "inv_scale": dict(inv_scale=torch.tensor(2.0**-16)),
    "clip_value": dict(clip_value=2.0**-10),
    "clip_value_0": dict(clip_value=0.0),
    "clip_coef": dict(clip_coef=torch.tensor(0.3)),
    "maximize": dict(maximize=True),
    "all": dict(
        inv_scale=torch.tensor(0.3), clip_value=3e-4, clip_coef=torch.tensor(0.7), maximize=True, skip_nonfinite=False
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", ["external", "torch", "came"])
def test_transforms(name, transform):
    """As the reference, where the scale of g is not normalized away: the moments keep it."""
    assert_close(*both(PAIR, name, transform=GradTransform(**transform)))


def run(bucket, name, transform):
    verb, hyper = DIALECTS[name]
    bucket.run(verb, transform=transform, backend="triton", **hyper)


def spoil(grad, value):
    """Write a value near the end, where neither the first tile nor the first matrix is."""
    grad[torch.unravel_index(torch.tensor(grad.numel() - 2), grad.shape)] = value


#: By place in SOME, of a vector, a stack and a strided matrix; 3e30 has no square in fp32.
BAD = {
    "nan": ({0: torch.nan, 2: torch.nan, 3: torch.nan}, None),
    "infinite": ({0: torch.inf, 2: -torch.inf, 3: torch.inf}, 0.5),
    "overflow": ({0: 3e30, 2: 3e30, 3: -3e30}, None),
}


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["external", "torch", "came"])
def test_a_nonfinite_gradient_skips_its_parameter(name, bad, precision):
    """No bit of it changes, it is counted once, and its neighbours do as if alone. Clipping does not hide an Inf."""
    verb, hyper = DIALECTS[name]
    values, clip_value = BAD[bad]
    whole, sound = (make_bucket(SOME, precision, verb=verb) for _ in range(2))
    for i, value in values.items():
        spoil(whole.grads[i], value)
    start = whole.copies()
    transform = GradTransform(clip_value=clip_value, skipped=torch.tensor(5))
    run(whole, name, transform)
    assert transform.skipped.item() == 5 + len(values)
    for column, old in zip(whole.columns(), start, strict=True):
        for i in values:
            if column[i] is not None:
                assert_same_bits(column[i], old[i])
    others = [i for i in range(len(SOME)) if i not in values]
    alone = sound.only(others)
    alone.run(
        verb, transform=GradTransform(clip_value=clip_value), rounding=sound.rounding(others), backend="triton", **hyper
    )
    assert_same_buckets(whole.only(others), alone)


@pytest.mark.parametrize("line", ["row", "column"])
@pytest.mark.parametrize("name", ["external", "torch", "came"])
def test_a_sum_of_squares_that_overflows_is_skipped(name, line):
    """Squares of 2.2e38 are finite, two of them in a row or column are not: C would be Inf for ever, and u 0."""
    bucket = make_bucket(PAIR, verb=DIALECTS[name][0])
    (bucket.grads[1][4, :2] if line == "row" else bucket.grads[1][:2, 4]).fill_(1.5e19)
    start = bucket.copies()
    transform = GradTransform(skipped=torch.tensor(0))
    run(bucket, name, transform)
    assert transform.skipped.item() == 1
    assert_same_buckets(bucket.only([1]).copies(), [column[1:] for column in start])


@pytest.mark.parametrize("name", ["external", "came"])
def test_a_large_gradient_that_is_clipped_is_used(name):
    """Only what is not finite by itself is hidden by clipping."""
    transform = GradTransform(clip_value=0.5, skipped=torch.tensor(0))

    def large(grad):
        spoil(grad, 3e30)
        return grad

    assert_close(*both(SOME, name, transform=transform, change=large))
    assert transform.skipped.item() == 0


@pytest.mark.parametrize("name", ["external", "torch", "came"])
def test_a_nonfinite_gradient_goes_through_when_asked(name):
    transform = GradTransform(skip_nonfinite=False, skipped=torch.tensor(0))

    def bad(grad):
        spoil(grad, torch.nan)
        return grad

    _, expected, actual = both(SOME, name, transform=transform, change=bad)
    for a, e in zip(actual.params, expected.params, strict=True):
        assert_same_bits(a.isfinite(), e.isfinite())
        assert not a.isfinite().any()  # it is in the RMS of the update
    assert_same_bits(torch.stack(actual.steps), torch.stack(expected.steps))
    assert transform.skipped.item() == 0


@pytest.mark.parametrize("name", ["external", "torch", "came"])
def test_found_inf_leaves_everything(name):
    verb = DIALECTS[name][0]
    usual, same, untouched = (make_bucket(PAIR, BF16_SR, verb=verb) for _ in range(3))
    transform = GradTransform(found_inf=torch.tensor(1.0), skipped=torch.tensor(3))
    run(same, name, transform)
    assert_same_buckets(same, untouched)
    assert transform.skipped.item() == 3
    run(same, name, GradTransform(found_inf=torch.tensor(0.0)))
    run(usual, name, GradTransform())
    assert_same_buckets(same, usual)
